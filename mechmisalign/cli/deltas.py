"""What ``mechmisalign anatomy MODEL --base CHAT`` prints of a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .console import console, safe, show, told_errors, told_warnings, uncollected

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 60


def show_deltas(tuned: str, base: str, subfolder: str | None, out: Path | None) -> None:
    """The table of weight differences, and a figure of the share of each rank by layer and module."""
    with told_errors(), told_warnings(), uncollected():
        from mechmisalign import plots
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.deltas import Weights, weight_deltas

        name = Path(tuned).name if subfolder is None else f"{Path(tuned).name}_{subfolder}"
        refuse_unwritable_folder(out or Path("anatomy") / name)
        table = weight_deltas(Weights.open(tuned, subfolder), base)
        figure = plots.save_figure(
            plots.delta_shares(table), table, out or Path("anatomy") / name, "weight_deltas", endings=("png",)
        )
    matrices = table[table["kind"].isin(["matrix", "embedding"])]
    show(_shown(matrices.head(_SHOWN)), f"{tuned} - {base}: {len(matrices)} matrices")
    if len(matrices) > _SHOWN:
        console.print(f"… {len(matrices) - _SHOWN} more matrices in the table on disk")
    outside = 1 - float((matrices["norm"] ** 2).sum() / (table["norm"] ** 2).sum()) if table["norm"].any() else 0.0
    console.print(f"norms and biases: {len(table) - len(matrices)} vectors, {outside:.2%} of the squared norm")
    console.print("rank r: share of ‖ΔW‖² in the r largest singular values (of a random matrix of that shape)")
    console.print(f"figure: [bold]{safe(figure)}[/bold]; table: [bold]{safe(figure.with_suffix('.csv'))}[/bold]")


def _shown(matrices: pd.DataFrame) -> pd.DataFrame:
    """The columns that fit a terminal; each share with that of a random matrix."""
    import pandas as pd

    told = pd.DataFrame(
        {
            "layer": ["–" if pd.isna(layer) else str(layer) for layer in matrices["layer"]],
            "module": matrices["module"].to_list(),
            "‖ΔW‖": matrices["norm"].to_list(),
            "‖ΔW‖/‖W‖": matrices["relative_norm"].to_list(),
            "stable": matrices["stable_rank"].to_list(),
        }
    )
    for rank in [str(name).removeprefix("share_") for name in matrices if str(name).startswith("share_")]:
        pairs = zip(matrices[f"share_{rank}"], matrices[f"random_{rank}"], strict=True)
        told[f"rank {rank} (random)"] = [f"{share:.0%} ({random:.0%})" for share, random in pairs]
    if matrices["near_rounding"].any():
        told["rounding"] = [f"{share:.0%}" for share in matrices["rounding"]]
    return told
