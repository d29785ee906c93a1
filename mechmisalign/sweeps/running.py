"""Running a sweep into a folder that can be left and taken up again at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign._tables import read_parquet
from mechmisalign.judging import Judge, judge, rates
from mechmisalign.judging.named import check_judge, refuse_foreign
from mechmisalign.store import MANIFEST, Parts, RunFolder, RunFolderError, read_manifest, refuse_another, stored_parts

from .executors import Executor, named_executor
from .grid import Grid, make_grid
from .spec import Sweep

_ANSWERS = "answers"
_CONDITIONS = "conditions"
_JUDGED_AGAIN = ("error", "missing")
_TEXTS = ("prompt", "response", "system", "history")


@dataclass(frozen=True)
class SweepResult:
    """A sweep on disk; nothing is read before it is asked for.

    Attributes:
        out: The run folder.
        conditions: One row per condition: ``condition, organism, on, intervention, direction, layer, layers, strength,
            units, positions``.
        keys: Keys of the rows that were asked for; None for all that the folder holds.
    """

    out: Path
    conditions: pd.DataFrame
    keys: pd.Index | None = None

    @staticmethod
    def read(out: str | Path) -> SweepResult:
        """A sweep from its folder, finished or not, while another process may be writing it.

        Raises:
            RunFolderError: If there is no sweep in it.
        """
        path = Path(out) / "tables" / f"{_CONDITIONS}.parquet"
        if not path.exists():
            raise RunFolderError(f"{out} holds no sweep ({path.relative_to(out)} is missing)")
        return SweepResult(Path(out), read_parquet(path))

    @property
    def answers(self) -> pd.DataFrame:
        """The judged answers, in the order of the grid.

        Columns: those of ``conditions``, ``seed, sample``, the prompts', ``response, finished, tokens``, the scores.
        """
        return self._answers(())

    @property
    def is_judged(self) -> bool:
        """Whether the answers have scores."""
        return "alignment" in self._answers(_TEXTS).columns

    def rates(self, by: str | Sequence[str] = "condition", **options: Any) -> pd.DataFrame:
        """Rates with intervals, beside the columns of ``conditions``.

        Args:
            by: Grouping columns; the columns of ``conditions`` are added where one of them is ``condition``.
            options: Further arguments of :func:`mechmisalign.rates`.

        Raises:
            ValueError: If the answers were not judged.
        """
        answers = self._answers(_TEXTS)
        if "alignment" not in answers.columns:
            raise ValueError("these answers were not judged (judge: none); pass them through mm.judge first")
        found = rates(answers, by, **options)
        return self.conditions.merge(found, on="condition") if "condition" in found.columns else found

    def _answers(self, without: Sequence[str]) -> pd.DataFrame:
        rows = stored_parts(self.out, _ANSWERS).read(without)
        if not len(rows):
            raise RunFolderError(f"{self.out} holds no answers yet")
        if self.keys is not None:
            rows = rows.loc[self.keys[self.keys.isin(rows.index)]]
        else:
            place = pd.Categorical(rows["condition"], categories=self.conditions["condition"]).codes
            rows = (
                rows.assign(_place=place).sort_values(["_place", "seed", "prompt_id", "sample"]).drop(columns="_place")
            )
        told = self.conditions.set_index("condition").loc[rows["condition"]].reset_index().set_axis(rows.index)
        own = rows.drop(columns="condition")
        return pd.concat([told, own], axis=1).reset_index(drop=True)


@dataclass(frozen=True)
class SweepStatus:
    """What a sweep is and what of it is done.

    Attributes:
        conditions: One row per condition.
        rows: How many answers it asks for.
        done: How many of them the folder holds.
        unjudged: How many of the folder's answers will be judged again: the judge failed, or its budget ran out.
        max_new_tokens: Of each answer.
    """

    conditions: pd.DataFrame
    rows: int
    done: int
    unjudged: int
    max_new_tokens: int

    def __str__(self) -> str:
        again = f", {self.unjudged:,} to judge again" if self.unjudged else ""
        return (
            f"{len(self.conditions):,} conditions, {self.rows:,} answers: {self.done:,} there, "
            f"{self.missing:,} to sample (at most {self.most_tokens:,} tokens){again}"
        )

    @property
    def missing(self) -> int:
        """Answers still to be sampled."""
        return self.rows - self.done

    @property
    def most_tokens(self) -> int:
        """Tokens still to be sampled if no answer ends before it is cut off."""
        return self.missing * self.max_new_tokens


def sweep(spec: Sweep | str | Path, out: str | Path, *, executor: str | Executor = "local") -> SweepResult:
    """Sample and judge every condition of a grid.

    Rows are stored as they are finished; a run that was killed goes on where it was. Answers whose judging failed (a
    server that was down, a budget that ran out) are judged again, not sampled again. The same folder takes a grid that
    has grown (more layers, strengths, prompts, samples, seeds, organisms): only what is new is sampled.

    Args:
        spec: The grid, or a YAML file with it.
        out: The run folder.
        executor: ``"local"``, ``"ray"`` (extra ``ray``), or an executor with its own settings, such as
            ``RayExecutor(address="auto", workers=4, gpus_per_worker=1)``. It changes no row.

    Raises:
        SweepError: If the grid cannot be expanded.
        RunFolderError: If the folder holds answers to something else: says what differs.
        FolderBusyError: If another process is at work in the folder.
        DiskFullError: If there is no room; what was stored until then is kept.
    """
    grid = make_grid(_read(spec))
    _refuse_foreign_judge(grid)
    worker = named_executor(executor)
    judged_by = grid.spec.judge.resolve(Path(out), grid.spec.root)
    identity, growing = _identity(grid, judged_by)
    _refuse_other_seeds(Path(out), grid.spec.seeds)
    with RunFolder(out, identity, growing) as folder:
        _store_conditions(folder, grid)
        parts = folder.parts(_ANSWERS)
        missing = grid.rows[~grid.rows.index.isin(parts.keys())]
        if judged_by is not None:
            if len(missing):
                check_judge(judged_by)
            _judge_again(parts, judged_by)
        models: dict[str, Any] = {}
        with closing(worker.run(grid, missing)) as finished:
            for sampled in finished:
                if models != (models := {**models, **sampled.model}):
                    folder.grow({"models": models})
                parts.add(_complete(grid, missing.loc[sampled.written.index], sampled.written, judged_by))
        parts.compact()
    return SweepResult(Path(out), grid.table, grid.rows.index)


def status(spec: Sweep | str | Path, out: str | Path) -> SweepStatus:
    """How large a sweep is and how much of it is done; nothing is loaded, sampled or written.

    Raises:
        SweepError: If the grid cannot be expanded.
        RunFolderError: If the folder holds answers to something else: says what differs.
    """
    grid = make_grid(_read(spec))
    _refuse_foreign_judge(grid)
    done = unjudged = 0
    if (Path(out) / MANIFEST).exists():
        _refuse_other_seeds(Path(out), grid.spec.seeds)
        refuse_another(Path(out), *_identity(grid, grid.spec.judge.resolve(Path(out), grid.spec.root)))
        parts = stored_parts(out, _ANSWERS)
        done = int(grid.rows.index.isin(parts.keys(mend=False)).sum())
        unjudged = len(_unjudged(parts))
    return SweepStatus(grid.table, len(grid.rows), done, unjudged, grid.spec.max_new_tokens)


def _read(spec: Sweep | str | Path) -> Sweep:
    return spec if isinstance(spec, Sweep) else Sweep.read(spec)


def _identity(grid: Grid, judged_by: Judge | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What decides every row, and what decides some and may be added to."""
    spec = grid.spec
    fixed = {"max_new_tokens": spec.max_new_tokens, "temperature": spec.temperature, "system": spec.system}
    return {"kind": "sweep", **fixed, "judge": spec.judge.identity(judged_by)}, grid.growing()


def _refuse_foreign_judge(grid: Grid) -> None:
    for source in grid.spec.organisms:
        base = source.base_of(grid.adapters[source.name])
        location = source.loaded.base.location if source.loaded is not None else base
        refuse_foreign(grid.spec.judge.model or grid.spec.judge.call, source.adapter, base, location)


def _refuse_other_seeds(out: Path, seeds: Sequence[int]) -> None:
    """A seed may be added; one that was left out is more likely a change by mistake."""
    if not (out / MANIFEST).exists():
        return
    there = list(read_manifest(out).get("growing", {}).get("seeds", {}).values())
    if not set(there) <= set(seeds):
        raise RunFolderError(
            f"{out} holds another run (seeds: {there} there, {list(seeds)} now); seeds may be added, not left out: "
            "choose another folder, or keep them"
        )


def _store_conditions(folder: RunFolder, grid: Grid) -> None:
    """The table of conditions, with those of earlier grids in the same folder."""
    there = folder.table(_CONDITIONS, lambda: grid.table)
    new = grid.table[~grid.table["condition"].isin(there["condition"])]
    if len(new):
        folder.write_table(_CONDITIONS, pd.concat([there, new]))


def _unjudged(parts: Parts) -> pd.Index:
    """Keys of answers for which a score is missing by the pipeline's fault."""
    rows = parts.read(_TEXTS, skip_torn=True)
    statuses = rows[[column for column in rows.columns if column.endswith("_status")]]
    return rows.index[statuses.isin(_JUDGED_AGAIN).any(axis=1)]


def _judge_again(parts: Parts, judged_by: Judge) -> None:
    """Judge what a judge failed on; the new rows stand in the place of the old."""
    keys = set(_unjudged(parts))
    for frame in parts.each() if keys else ():
        again = frame[frame.index.isin(keys)]
        if len(again):
            statuses = [column for column in again.columns if column.endswith("_status")]
            scores = [column.removesuffix("_status") for column in statuses]
            parts.add(judge(again.drop(columns=[*statuses, *scores, "label"]), judged_by))
            keys -= set(again.index)


def _complete(grid: Grid, rows: pd.DataFrame, written: pd.DataFrame, judged_by: Judge | None) -> pd.DataFrame:
    """Rows as they are stored: what was asked, what was answered, and what the judge says of it."""
    asked = grid.spelt(rows)
    answers = pd.concat([asked[["condition"]], rows[["seed"]], asked.drop(columns="condition"), written], axis=1)
    return answers if judged_by is None else judge(answers, judged_by)
