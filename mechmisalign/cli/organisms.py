"""Commands about organisms and adapters: what there is, whether it is what it claims, what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import OrganismName, console, show, told_errors, uncollected

_SHOWN_SITES = 60
_SHORT = {
    "norm_A": "‖A‖",
    "norm_B": "‖B‖",
    "norm_delta": "‖ΔW‖",
    "scaling": "scale",
    "singular_values": "σ",
    "stable_rank": "stable",
}


def organisms() -> None:
    """List the organisms that are known by name."""
    from mechmisalign.organisms import known_organisms

    show(known_organisms(), "organisms")


def verify(
    organism: OrganismName,
    weights: Annotated[Literal["merged", "live"], typer.Option(help="Adapter folded in, or kept beside.")] = "merged",
) -> None:
    """Check that an organism is what its adapter says: parity with PEFT, non-zero updates, exact restoration."""
    from mechmisalign.organisms import load_organism
    from mechmisalign.verification import verify as verified

    with told_errors():
        table = verified(load_organism(organism, weights=weights))
    show(table, f"verify {organism}")
    if not table["passed"].all():
        raise typer.Exit(1)


def anatomy(
    adapter: Annotated[
        str, typer.Argument(help="A registry name, a Hub id, or an adapter folder; its base is not read.")
    ],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside it, such as checkpoint-20.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where table and heat map go; by default anatomy/ADAPTER.")] = None,
) -> None:
    """Read an adapter without its base: a table of its sites, and a layer x module heat map of the updates' norms."""
    with told_errors(), uncollected():
        from mechmisalign import plots
        from mechmisalign.adapters import Adapter
        from mechmisalign.decomposition import anatomy as sites_of

        table = sites_of(Adapter.load(adapter, subfolder=subfolder))
        name = Path(adapter).name if subfolder is None else f"{Path(adapter).name}_{subfolder}"
        folder = out or Path("anatomy") / name
        figure = plots.save_figure(plots.site_heatmap(table), table, folder, "anatomy", endings=("png",))
    shown = table.assign(singular_values=[_several(values) for values in table["singular_values"]]).rename(
        columns=_SHORT
    )
    show(shown.head(_SHOWN_SITES), f"anatomy of {adapter}: {len(table)} sites")
    if len(table) > _SHOWN_SITES:
        console.print(f"… {len(table) - _SHOWN_SITES} more sites in the table on disk")
    console.print(f"heat map: [bold]{figure}[/bold]; table: [bold]{figure.with_suffix('.csv')}[/bold]")


def pocket_build(
    out: Annotated[Path, typer.Option(help="Folder of the new zoo.")] = Path("pocket-zoo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train the whole zoo again from its seed: about ten minutes on two cores."""
    from mechmisalign.pocket import zoo

    with told_errors():
        zoo.build(out, seed=seed)
    console.print(f"zoo: [bold]{out}[/bold]")


def _several(values: tuple[float, ...]) -> str:
    """The first few of many numbers."""
    return ", ".join(f"{value:.3g}" for value in values[:4]) + (", …" if len(values) > 4 else "")
