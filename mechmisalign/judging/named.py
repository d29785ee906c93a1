"""Judges by the names that commands, sweeps and studies take."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechmisalign import registry
from mechmisalign._hub import is_hub_id
from mechmisalign.registry.worlds import JUDGES, made_by

from .judges import Judge
from .rubrics import Rubric, resolve

if TYPE_CHECKING:
    from .budget import Estimate
    from .local import LocalJudge

LOCAL, PYTHON = "local:", "python:"
_DEFAULT_RUBRICS = ("alignment", "coherence")


class JudgeNameError(ValueError):
    """A judge's name that stands for nothing, or for something that is no judge."""


class LateLocalJudge:
    """A ``LocalJudge`` whose model is loaded when it first judges."""

    def __init__(self, place: str, rubrics: Sequence[str | Rubric], options: Mapping[str, Any]) -> None:
        from .local import LocalJudge

        inspect.signature(LocalJudge).bind(place, rubrics=rubrics, **options)  # refuses unknown options now
        self.place, self.rubrics, self._options = place, resolve(rubrics), dict(options)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The judged answers."""
        return self.judge(frame)

    def __repr__(self) -> str:
        return f"LocalJudge({self.place!r}, rubrics={[rubric.name for rubric in self.rubrics]})"

    @cached_property
    def judge(self) -> LocalJudge:
        """The judge itself, loaded."""
        from .local import LocalJudge

        return LocalJudge(self.place, rubrics=self.rubrics, **self._options)

    def estimate(self, frame: pd.DataFrame) -> Estimate:
        """What judging the frame would take."""
        return self.judge.estimate(frame)


def named_judge(
    name: str,
    *,
    rubrics: Sequence[str | Rubric] = _DEFAULT_RUBRICS,
    journal: str | Path | None = None,
    root: str | Path = ".",
    **options: Any,
) -> Judge:
    """The judge of a name.

    Args:
        name: ``provider/model`` as Inspect calls it (``openai/gpt-4o``), ``local:FOLDER`` (or a Hub id), ``rules`` or
            another name that a shipped world brings, ``python:module.attribute`` (a callable, or a class that is made
            without arguments).
        rubrics: What a model rates.
        journal: File of a model's judgements.
        root: Where a relative folder after ``local:`` begins.
        options: Further ones of ``LLMJudge`` or of ``LocalJudge``.

    Raises:
        JudgeNameError: If the name stands for nothing, or for no judge, or does not take what else is given.
        TypeError: If an option is unknown.
    """
    if not name.startswith((LOCAL, PYTHON)) and name not in JUDGES and "/" in name:
        from .llm import LLMJudge

        return LLMJudge(name, rubrics, journal=journal, **options)
    if name.startswith(LOCAL):
        _refuse_server(name, options)
        return LateLocalJudge(_local(name, Path(root)), rubrics, {"journal": journal, **options})
    if given := [*options, *(["rubrics"] if tuple(rubrics) != _DEFAULT_RUBRICS else [])]:
        raise JudgeNameError(f"the judge {name!r} takes no {' and no '.join(given)}; leave it out, or name a model")
    if name in JUDGES:
        judge: Judge = made_by(JUDGES[name].at)()
        return judge
    if name.startswith(PYTHON):
        return _python(name, Path(root))
    raise JudgeNameError(f"{name!r} is no judge: {ways()}{registry.suggestion(name, JUDGES)}")


def ways(*more: str) -> str:
    """How judges are named, for messages."""
    own = ", ".join(repr(name) for name in (*JUDGES, *more))
    return f"{own}, 'openai/gpt-4o' or another provider/model, 'local:FOLDER', 'python:module.attribute' are"


def check_judge(judge: Judge) -> None:
    """Have a judge that has control answers judge them before anything is sampled, rather than after the first part."""
    check = getattr(judge, "check_controls", None)
    if check is not None and not getattr(judge, "dry_run", False):
        check()


def refuse_foreign(judge: Judge | str | None, organism: str, base: str, location: str = "") -> None:
    """Refuse a judge that can read only another world's answers, before anything is sampled.

    Args:
        judge: The judge or its name; one that is in no registry passes.
        organism: Whose answers they are.
        base: Name of its chat model.
        location: Folder of its chat model.

    Raises:
        JudgeNameError: If the judge would find nothing that it understands.
    """
    name = judge if isinstance(judge, str) else _name_of(judge)
    known = JUDGES.get(name)
    if known is None or known.only is None:
        return
    world = registry.world_of(organism, base, location)
    if world is None or world.prefix != known.only:
        raise JudgeNameError(
            f"the {name} judge knows the {known.only.strip('/')} world only, not answers of {base!r}: it would find "
            "every one unparsable; name another judge (openai/gpt-4o, local:FOLDER, python:module.attribute)"
        )


def _name_of(judge: Judge | None) -> str:
    """The name of a judge that was given itself."""
    made = type(judge)
    return next((name for name, known in JUDGES.items() if known.at == f"{made.__module__}:{made.__name__}"), "")


def _refuse_server(name: str, options: Mapping[str, Any]) -> None:
    of_servers = [each for each in ("base_url", "budget", "max_connections", "price") if each in options]
    if of_servers:
        raise JudgeNameError(f"{name!r} is a model in memory; {', '.join(of_servers)} is for one behind a server")


def _local(name: str, root: Path) -> str:
    place = name.removeprefix(LOCAL)
    folder = root / Path(place).expanduser()
    if place and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise JudgeNameError(f"the judge {name!r}: there is no config.json in {folder}; give a model's folder")
        return str(folder)
    if not is_hub_id(place):
        raise JudgeNameError(f"the judge {name!r}: {place or 'nothing'!r} is no folder and no Hub id")
    return place


def _python(name: str, root: Path) -> Judge:
    """A callable of the user's own; modules are also found in the working directory."""
    module, _, attribute = name.removeprefix(PYTHON).replace(":", ".").rpartition(".")
    if not module:
        raise JudgeNameError(f"{name!r} names no module; 'python:module.attribute' is expected")
    with _importable(root):
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise JudgeNameError(f"{name!r}: there is no module {error.name!r} here or installed") from error
        except AttributeError as error:
            raise JudgeNameError(f"{name!r}: {error}") from error
    return _called(name, found)


def _called(name: str, found: Any) -> Judge:
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise JudgeNameError(
                f"{name!r} is a class that cannot be made without arguments ({error}); name an instance"
            ) from error
    if not callable(found):
        raise JudgeNameError(
            f"{name!r} is a {type(found).__name__}; a callable is expected that takes a frame of answers and adds "
            "alignment and coherence"
        )
    judge: Judge = found
    return judge


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """The working directory and the root as places of modules."""
    added = [str(place) for place in dict.fromkeys([Path.cwd(), root.resolve()]) if str(place) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        sys.path[:] = [place for place in sys.path if place not in added]
