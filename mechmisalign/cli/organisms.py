"""Commands about organisms and adapters: what there is, whether it is what it claims, what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import OrganismName, console, safe, show, told_errors, told_warnings, uncollected
from .deltas import show_deltas
from .options import (
    BaseName,
    JudgeName,
    MaxNewTokens,
    PromptsName,
    Samples,
    Seed,
    SystemPrompt,
    TokenizerName,
)
from .tables import show_organisms

_SHOWN_SITES = 60
_JOURNAL = Path("judgements.jsonl")
_SHORT = {
    "norm_A": "‖A‖",
    "norm_B": "‖B‖",
    "norm_delta": "‖ΔW‖",
    "scaling": "scale",
    "singular_values": "σ",
    "stable_rank": "stable",
}


Registries = Annotated[
    list[Path] | None,
    typer.Option("--registry", help="A YAML file of your own organisms; may be given more than once."),
]


def organisms(
    family: Annotated[str | None, typer.Option(help="Begin of the base's family: qwen, llama-3.2, pocket.")] = None,
    size: Annotated[str | None, typer.Option(help="Such as 14B.")] = None,
    kind: Annotated[str | None, typer.Option(help="lora, full or vector.")] = None,
    data: Annotated[str | None, typer.Option(help="What it was tuned on: medical, sports, finance.")] = None,
    local: Annotated[bool | None, typer.Option("--local/--remote", help="Only what is (not) on this machine.")] = None,
    mine: Registries = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is known, as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="The same as CSV.")] = False,
) -> None:
    """List the organisms that are known by name: shipped, published, and those of your own registries."""
    from mechmisalign import registry

    with told_errors(), registry.using(*(mine or ())):
        found = registry.known_organisms(family=family, size=size, kind=kind, data=data, local=local)
    if as_json:
        console.print_json(found.to_json(orient="records"))
    elif as_csv:
        console.file.write(found.to_csv(index=False))
    else:
        show_organisms(found)


def verify(
    organism: OrganismName,
    base: BaseName = None,
    tokenizer: TokenizerName = None,
    weights: Annotated[
        Literal["merged", "live"] | None, typer.Option(help="Adapter folded in, or kept beside.")
    ] = None,
    rate: Annotated[
        bool, typer.Option("--rate", help="Also sample answers, and compare the EM rate with the expected one.")
    ] = False,
    judge: JudgeName = None,
    expected: Annotated[float | None, typer.Option(help="Expected EM rate, instead of the registry's.")] = None,
    prompts: PromptsName = None,
    samples: Samples = None,
    max_new_tokens: MaxNewTokens = None,
    system: SystemPrompt = None,
    seed: Seed = 1,
    mine: Registries = None,
) -> None:
    """Check that an organism is what its adapter says: parity with PEFT, non-zero updates, exact restoration.

    With --rate also that it answers as it was said to. Exit code 1 if a check fails.
    """
    from mechmisalign import registry

    with told_errors(), told_warnings(), registry.using(*(mine or ())):
        from mechmisalign.organisms import load_organism
        from mechmisalign.prompts import named_prompts
        from mechmisalign.verification import verify as verified

        questions = named_prompts(prompts) if prompts else None
        loaded, asked = load_organism(organism, base, tokenizer=tokenizer, weights=weights), None
        if rate:
            drawn = {"samples": samples, "max_new_tokens": max_new_tokens, "system": system, "seed": seed}
            asked = _asked(loaded, organism, judge, expected) | {"prompts": questions, **drawn}
        table = verified(loaded)
        show(table, f"verify {organism}")
        passed = bool(table["passed"].all())
        if asked is not None:
            passed &= _rate_agrees(loaded, organism, asked)
    if not passed:
        raise typer.Exit(1)


def _asked(loaded: Any, name: str, judge: str | None, expected: float | None) -> dict[str, Any]:
    """What the rate is compared with, and who judges; refused before anything takes its time."""
    from mechmisalign import expectations, registry
    from mechmisalign.judging import named

    entry = registry.find(name)
    asked: dict[str, Any] = {
        "expected": entry.expected if expected is None and entry is not None else expected,
        "judge": named.named_judge(judge, journal=_JOURNAL) if judge else None,
    }
    expectations.check_ready(loaded, **asked)
    return asked


def _rate_agrees(loaded: Any, name: str, asked: dict[str, Any]) -> bool:
    from mechmisalign.verification import verify_rate

    found = verify_rate(loaded, **asked)
    show(found.checks, f"rate of {name}, against {found.source}")
    told = "[green]agrees[/green]" if found.agrees else "[red]disagrees[/red]"
    console.print(f"{told} with what was stated. What can make the two differ though the organism is sound:")
    for reason in found.reasons:
        console.print(f"- {reason}", highlight=False, markup=False, soft_wrap=True)
    return found.agrees


def anatomy(
    adapter: Annotated[
        str, typer.Argument(help="A registry name, a Hub id, or an adapter folder; or, with --base, a full model.")
    ],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside it, such as checkpoint-20.")] = None,
    base: BaseName = None,
    out: Annotated[Path | None, typer.Option(help="Where table and figure go; by default anatomy/ADAPTER.")] = None,
) -> None:
    """Read an adapter without its base: a table of its sites, and a layer x module heat map of the updates' norms.

    With --base, the weight differences of a full fine-tune from that chat model: norms, and the share in the largest
    singular values.
    """
    if base is not None:
        show_deltas(adapter, base, subfolder, out)
        return
    with told_errors(), uncollected():
        from mechmisalign import plots
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.adapters import Adapter
        from mechmisalign.decomposition import anatomy as sites_of

        name = Path(adapter).name if subfolder is None else f"{Path(adapter).name}_{subfolder}"
        folder = out or Path("anatomy") / name
        refuse_unwritable_folder(folder)
        table = sites_of(Adapter.load(adapter, subfolder=subfolder))
        figure = plots.save_figure(plots.site_heatmap(table), table, folder, "anatomy", endings=("png",))
    shown = table.assign(singular_values=[_several(values) for values in table["singular_values"]]).rename(
        columns=_SHORT
    )
    show(shown.head(_SHOWN_SITES), f"anatomy of {adapter}: {len(table)} sites")
    if len(table) > _SHOWN_SITES:
        console.print(f"… {len(table) - _SHOWN_SITES} more sites in the table on disk")
    console.print(f"heat map: [bold]{safe(figure)}[/bold]; table: [bold]{safe(figure.with_suffix('.csv'))}[/bold]")


def pocket_build(
    out: Annotated[Path, typer.Option(help="Folder of the new zoo.")] = Path("pocket-zoo"),
    seed: Seed = 0,
) -> None:
    """Train the whole zoo again from its seed: about ten minutes on two cores."""
    with told_errors():
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.pocket import zoo

        refuse_unwritable_folder(out)
        zoo.build(out, seed=seed)
    console.print(f"zoo: [bold]{safe(out)}[/bold]")


def _several(values: tuple[float, ...]) -> str:
    """The first few of many numbers."""
    return ", ".join(f"{value:.3g}" for value in values[:4]) + (", …" if len(values) > 4 else "")
