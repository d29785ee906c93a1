"""Where a study's numbers come from, for its report: whose answers were read, and how to get the numbers again."""

from __future__ import annotations

import pandas as pd

from mechmisalign import registry
from mechmisalign.report import ReportTable, Section

from .records import Records


def whose(sources: pd.DataFrame) -> str:
    """Whose answers a pool holds, in words; a class that is missing is filled with the chat model's."""
    others = sources[sources["source"] != "organism"]
    if not len(others):
        return "the organism's own"
    counts = " and ".join(f"{row.answers} {row.label}" for row in others.itertuples())
    return (
        f"the organism's own and, because these were too few of one class, {counts} answers of the chat model to the "
        "same prompts (so the difference also holds what tells the two models' texts apart)"
    )


def reproduction(records: Records) -> Section:
    """How to get the same numbers again."""
    identity = {key: str(value) for key, value in records.manifest["identity"].items() if key != "settings"}
    rows = identity | {key: str(value) for key, value in records.manifest["environment"].items() if value is not None}
    frame = pd.DataFrame({"what": list(rows), "value": list(rows.values())})
    return Section(
        title="Reproduction",
        lead="The same seed on the same machine gives the same answers. Tables and figures lie beside this file.",
        code=_command(records),
        tables=(ReportTable(frame, "The run and its environment."),),
    )


def _command(records: Records) -> str:
    """The command line that asked for the run; of one from Python, the call with the settings that differ."""
    if "command" in records.summary:
        return str(records.summary["command"])
    if registry.is_reserved(records.organism):
        return f"mechmisalign study {records.organism} --out {records.path.name} --seed {records.settings['seed']}"
    settings = ", ".join(f"{name}={value!r}" for name, value in records.settings.items() if value is not None)
    call = f"mm.study({records.organism!r}, {str(records.path)!r}, prompts=prompts, judge=judge, settings=settings)"
    return f"settings = StudySettings({settings})\n{call}"
