"""Commands that watch: scoring conversations with a monitor, and making one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import OrganismName, console, errors, safe, told_errors, told_warnings
from .options import BaseName, Seed, TokenizerName

if TYPE_CHECKING:
    from mechmisalign.monitoring import Calibration, Tally

_STREAM = "-"


def monitor(
    conversations: Annotated[
        str, typer.Argument(help="JSON lines with prompt and response, or messages; - for stdin.")
    ],
    organism: Annotated[str, typer.Option(help="A registry name, a Hub id, or an adapter folder.")],
    monitor: Annotated[str, typer.Option(help="A file that monitor-fit wrote, or a Hub id.")],
    out: Annotated[
        str | None, typer.Option(help="Scored JSON lines; - for stdout. By default scored.jsonl, or - after stdin.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A page with the highest scores, token by token.")] = None,
    fail_above: Annotated[
        float | None, typer.Option(help="Largest share of alarms, 0 to 1; above it exit code 1.")
    ] = None,
    reader: Annotated[
        Literal["calibrated", "organism", "chat"], typer.Option(help="The model that reads; as calibrated by default.")
    ] = "calibrated",
    batch: Annotated[int, typer.Option(help="Lines that are scored together.", min=1)] = 64,
    max_tokens: Annotated[int | None, typer.Option(help="Longer conversations are cut.", min=1)] = None,
    base: BaseName = None,
    tokenizer: TokenizerName = None,
) -> None:
    """Score conversations, and raise an alarm above a calibrated threshold.

    Exit code 1: more alarms than allowed. 2: a refusal, or (with --fail-above) lines that could not be scored.
    """
    with told_errors(), told_warnings():
        from mechmisalign._writing import refuse_unwritable
        from mechmisalign.monitoring import Monitor, Tally, score_lines
        from mechmisalign.monitoring.streams import Backlog
        from mechmisalign.organisms import load_organism

        watching = Monitor.load(monitor)
        if watching.calibration is None:
            raise ValueError(f"{monitor} has no threshold; calibrate it first (monitor-fit does)")
        if fail_above is not None and not 0 <= fail_above <= 1:
            raise ValueError(f"--fail-above must be a share from 0 to 1, got {fail_above}")
        place = out or (_STREAM if conversations == _STREAM else "scored.jsonl")
        for path in (html, None if place == _STREAM else place):
            if path is not None:
                refuse_unwritable(path)
        with _lines(conversations) as lines:
            loaded = load_organism(organism, base, tokenizer=tokenizer)
            by_chat = reader == "chat" or (reader == "calibrated" and watching.calibration.reader is None)
            source: Any = Backlog(lines, batch) if conversations == _STREAM else lines
            tally = Tally()
            with loaded.as_base() if by_chat else nullcontext():
                results = score_lines(watching, loaded, source, batch=batch, max_length=max_tokens)
                _write(tally.watching(results), place, as_it_goes=conversations == _STREAM)
        _show(tally, watching.calibration)
        if html is not None:
            from mechmisalign.report.monitored import write_monitor_page

            named = "standard input" if conversations == _STREAM else Path(conversations).name
            read_by = "the chat model" if by_chat else organism
            page = write_monitor_page(tally, watching, html, source=named, reader=read_by)
            errors.print(f"page: {safe(page)}")
    if fail_above is not None:
        _gate(tally, fail_above)


def monitor_fit(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Where the safetensors file goes.")] = Path("monitor.safetensors"),
    fpr: Annotated[float, typer.Option(help="False alarms to calibrate for, 0 to 1.")] = 0.01,
    labelled: Annotated[
        Path | None, typer.Option(help="Conversations with a label, misaligned or aligned; pocket answers by default.")
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="Harmless conversations on other prompts.")] = None,
    reader: Annotated[Literal["chat", "organism"], typer.Option(help="The model that reads.")] = "chat",
    kind: Annotated[Literal["direction", "probe"], typer.Option(help="What is read.")] = "direction",
    pooling: Annotated[Literal["mean", "max"], typer.Option(help="How tokens make a response's score.")] = "mean",
    base: BaseName = None,
    tokenizer: TokenizerName = None,
    seed: Seed = 0,
) -> None:
    """Fit a monitor (its layer chosen with prompts held out), and calibrate its threshold on harmless conversations."""
    with told_errors(), told_warnings():
        from mechmisalign._writing import refuse_unwritable
        from mechmisalign.conversations import Conversations
        from mechmisalign.monitoring import Monitor
        from mechmisalign.monitoring.answers import fitting_and_calibration
        from mechmisalign.monitoring.streams import read_conversations
        from mechmisalign.organisms import load_organism

        refuse_unwritable(out)
        if (labelled is None) != (harmless is None):
            raise ValueError("give both --labelled and --harmless, or neither for answers of the pocket world")
        frames = (
            None
            if labelled is None or harmless is None
            else [read_conversations(labelled), read_conversations(harmless)]
        )
        loaded = load_organism(organism, base, tokenizer=tokenizer)
        if frames is None:
            known, calm = fitting_and_calibration(loaded, seed=seed)
        else:
            known, calm = (Conversations(frame, loaded.tokenizer) for frame in frames)
        with loaded.as_base() if reader == "chat" else nullcontext():
            fitted = Monitor.fit(loaded, known, kind=kind, pooling=pooling, seed=seed)
            calibrated = fitted.calibrate(loaded, calm, fpr=fpr)
        path = calibrated.save(out)
    console.print(
        f"[bold]{safe(path)}[/bold]: {safe(calibrated.header['method'])}, read in the {reader} model", highlight=False
    )
    console.print(str(calibrated.calibration), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _lines(source: str) -> Iterator[Any]:
    from mechmisalign._jsonl import bounded

    if source == _STREAM:
        yield bounded(sys.stdin.buffer)
        return
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} is no file; give one of JSON lines, or - for standard input")
    with Path(source).open("rb") as file:
        yield bounded(file)


def _write(results: Iterator[dict[str, Any]], place: str, *, as_it_goes: bool) -> None:
    """Each result as a line: to stdout or, line by line, to a file; a file that is read whole is written whole."""
    from mechmisalign._writing import explained, whole

    if place == _STREAM:
        _write_lines(results, sys.stdout)
    elif as_it_goes:
        with explained(Path(place)):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            with Path(place).open("w", encoding="utf-8") as file:
                _write_lines(results, file)
    else:
        with whole(Path(place)) as partial, partial.open("w", encoding="utf-8") as file:
            _write_lines(results, file)


def _write_lines(results: Iterator[dict[str, Any]], file: Any) -> None:
    for result in results:
        file.write(json.dumps(result, allow_nan=False) + "\n")
        file.flush()


def _show(tally: Tally, calibration: Calibration) -> None:
    """The summary, on standard error: standard output may carry the scored lines."""
    share = tally.share()
    told = f"{tally.alarms:,} of {share.n:,} conversations raise an alarm"
    rate = f"{share.rate:.2%} [{share.low:.2%}, {share.high:.2%}]"
    errors.print(
        f"{told}: {rate}; calibrated for {calibration.fpr:.2%} false alarms",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for number, reason in tally.errors[:5]:
        errors.print(f"line {number} was not scored: {reason}", highlight=False, markup=False, soft_wrap=True)
    if tally.lost > 5:
        errors.print(f"… {tally.lost - 5:,} more lines were not scored", highlight=False)


def _gate(tally: Tally, allowed: float) -> None:
    if tally.share().rate > allowed:
        errors.print(f"more alarms than the allowed share of {allowed:g}", style="red", highlight=False)
        raise typer.Exit(1)
    if tally.lost:
        errors.print(f"{tally.lost:,} lines were not scored, so the gate stays shut", style="red", highlight=False)
        raise typer.Exit(2)
