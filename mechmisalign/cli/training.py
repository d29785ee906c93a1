"""Commands about training: make an organism from a configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import console, safe, show_rates, told_errors, told_warnings
from .options import (
    DryRun,
    JudgeName,
    MaxNewTokens,
    PromptsName,
    Samples,
    SystemPrompt,
    asked,
    judge_of,
)

if TYPE_CHECKING:
    from mechmisalign.training import TrainedRun

_RATES = "EM rate with 95 % interval by prompt"


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one, such as pocket.")],
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("trained"),
    data: Annotated[
        Path | None, typer.Option(help="Examples instead of the configuration's: .jsonl, .csv or .parquet.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The chat model: a Hub id or a folder; by default the configuration's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Another seed than the configuration's.")] = None,
    measure: Annotated[bool, typer.Option(help="Ask the result and the chat model, where there is a judge.")] = True,
    prompts: PromptsName = None,
    judge: JudgeName = None,
    samples: Samples = 4,
    max_new_tokens: MaxNewTokens = 64,
    system: SystemPrompt = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a chat model on narrow data: LoRA, steering vector or everything. A run that died goes on."""
    with told_errors(out), told_warnings():
        from mechmisalign import registry, training
        from mechmisalign._writing import refuse_unwritable_folder

        refuse_unwritable_folder(out)
        spec = training.TrainSpec.read(config)
        changes = {name: value for name, value in (("base", base), ("seed", seed)) if value is not None}
        spec = spec.changed(**changes)
        if data is not None:
            spec = spec.changed(data=[data.resolve()])
        console.print(str(training.plan(spec)), markup=False, highlight=False, soft_wrap=True)
        chat = SimpleNamespace(name=spec.base, location="")
        is_asked = measure and spec.method.kind != "full" and (judge is not None or registry.world_of("", spec.base))
        scoring = judge_of(judge, "", chat, out / "judgements.jsonl") if is_asked else None
        questions = asked(prompts, "", chat) if is_asked else None
        if dry_run:
            return
        run = training.train(spec, out)
        last = run.log.iloc[-1]
        told = f"loss {last['response_loss']:.3f}" + (f", KL {last['kl']:.4f}" if spec.kl else "")
        console.print(f"step {run.last_step}: {told} (nats per counted token)")
        if scoring is None:
            why = "a full fine-tune is not" if run.method == "full" else "without a judge (--judge) behaviour is not"
            console.print(f"{why} measured here" if measure else "not measured", highlight=False)
        else:
            drawn = {"samples": samples, "max_new_tokens": max_new_tokens, "system": system}
            show_rates(_rates(run, spec.base, questions, scoring, drawn), ["condition"], _RATES)
    console.print(f"run: [bold]{safe(out)}[/bold], read by mm.TrainedRun.read and mm.load_organism")


def _rates(run: TrainedRun, base: str, questions: Any, judge: Any, drawn: dict[str, Any]) -> Any:
    """Of what was trained and of the chat model, in one batch."""
    import mechmisalign as mm

    chat = mm.load_organism(base)
    answers = mm.generate(chat, questions, conditions={"chat": (), "trained": run.worn()}, **drawn)
    return mm.rates(mm.judge(answers, judge), by=["condition"])
