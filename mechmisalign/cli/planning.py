"""The command that says what a load would take."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .console import OrganismName, console, told_errors

Precision = Literal["float32", "bfloat16", "float16"]


def plan(
    organism: OrganismName,
    base: Annotated[str | None, typer.Option(help="The chat model; by default the adapter's own.")] = None,
    weights: Annotated[
        Literal["merged", "live"] | None, typer.Option(help="Adapter folded in, or kept beside.")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="By default that of the checkpoint.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0 …; by default the GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread over GPUs, the host and files.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder inside the adapter's, such as checkpoint-20.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub.")] = False,
) -> None:
    """Say what loading an organism takes, and load nothing: bytes to download, memory by place, what does not fit.

    Exit code 1 says that it does not fit.
    """
    with told_errors():
        import torch

        from mechmisalign.loading.planning import loading_plan

        planned = loading_plan(
            organism,
            base,
            weights=weights,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            device_map=device_map,
            subfolder=subfolder,
            revision=revision,
            local_files_only=offline,
        )
    console.print(str(planned), markup=False, highlight=False, soft_wrap=True)
    if not planned.fits:
        raise typer.Exit(1)
