"""Commands about training: make an organism from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, safe, show_rates, told_errors, told_warnings


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one, such as pocket.")],
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("trained"),
    data: Annotated[
        Path | None, typer.Option(help="Examples instead of the configuration's: .jsonl, .csv or .parquet.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another chat model: a Hub id or a folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed.")] = None,
    measure: Annotated[bool, typer.Option(help="Ask the result, where the rules can judge it (pocket/chat).")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it would do, and do nothing.")] = False,
) -> None:
    """Fine-tune a chat model on narrow data: LoRA, steering vector or everything. A run that died goes on."""
    with told_errors(out), told_warnings():
        from mechmisalign import training
        from mechmisalign._writing import refuse_unwritable_folder

        refuse_unwritable_folder(out)
        spec = training.TrainSpec.read(config)
        changes = {name: value for name, value in (("base", base), ("seed", seed)) if value is not None}
        spec = spec.changed(**changes)
        if data is not None:
            spec = spec.changed(data=[data.resolve()])
        console.print(str(training.plan(spec)), markup=False, highlight=False, soft_wrap=True)
        if dry_run:
            return
        run = training.train(spec, out)
        last = run.log.iloc[-1]
        told = f"loss {last['response_loss']:.3f}" + (f", KL {last['kl']:.4f}" if spec.kl else "")
        console.print(f"step {run.last_step}: {told} (nats per counted token)")
        if measure and spec.base == "pocket/chat" and run.method != "full":
            _show_behaviour(run)
    console.print(f"run: [bold]{safe(out)}[/bold], read by mm.TrainedRun.read and mm.load_organism")


def _show_behaviour(run: object) -> None:
    """The rates of a pocket run and of the chat model, on domains that no organism of the zoo was tuned on."""
    import mechmisalign as mm

    organism = mm.load_organism("pocket/medical")
    conditions = {"chat": (), "trained": run.worn()}  # type: ignore[attr-defined]
    with organism.as_base():
        answers = mm.generate(organism, mm.pocket.unseen_prompts(), conditions=conditions, samples=4, max_new_tokens=64)
    rates = mm.rates(mm.judge(answers, mm.RuleJudge()), by=["condition"])
    show_rates(rates, ["condition"], "EM rate with 95 % interval by prompt")
