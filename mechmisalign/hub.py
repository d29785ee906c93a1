"""To the Hub: directions, probes, monitors, and cured adapters and models, each with a card that says what it is.

The same files are written to a folder instead, to look at them first. What was pushed is read back with
``mm.Direction.load("owner/name")`` (``Probe``, ``Monitor``) or ``mm.load_organism("owner/name")``.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._hub import HubError, asking, is_hub_id, is_offline
from ._sharing import Artifact, stage
from .adapters import Adapter
from .correction.saving import refuse_taken, whole_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Pushed", "push"]


@dataclass(frozen=True)
class Pushed:
    """Where something went.

    Attributes:
        place: The repository, or the folder of a dry run.
        files: Names of the files.
        commit: The commit on the Hub; None for a folder.
    """

    place: str
    files: tuple[str, ...]
    commit: str | None = None


def push(
    thing: Artifact | Adapter | str | Path,
    repo_id: str | Path,
    *,
    private: bool = True,
    replace_files: bool = False,
    base: str | None = None,
    note: str = "",
    measured: pd.DataFrame | None = None,
    branch: str | None = None,
    message: str = "",
) -> Pushed:
    """Put a direction, a probe, a monitor, an adapter or a model on the Hub, with a card.

    The token is the one of ``hf auth login`` or ``HF_TOKEN``; the client of the Hub sends it, nothing here reads it.

    Args:
        thing: A direction, probe, monitor or adapter in memory, or the path of one: its safetensors file, or the folder
            that ``save_adapter`` or ``save_model`` wrote.
        repo_id: ``owner/name`` on the Hub; made if it is not there. A ``Path``, or text that begins with ``/``, ``.``
            or ``~``, is a folder of a dry run: it gets the files that would be pushed, and nothing is sent.
        private: Whether the repository is (made) private. An existing public one is then refused.
        replace_files: Push although the repository holds files of these names (their old versions stay in its history).
        base: What the base model is called on the Hub; by default what the thing itself says, if that is a Hub id.
        note: A sentence of yours for the card (of a direction, probe or monitor).
        measured: A table of results for the card, also written as ``measured.csv``.
        branch: Branch of the repository; the main one by default.
        message: Of the commit.

    Returns:
        The place, the names of the files, and the commit.

    Raises:
        ValueError: If it is nothing that can be pushed, or its base is a folder of this machine and no ``base`` is
            given.
        HubError: If the Hub refuses, cannot be reached, or holds something that would be replaced.
        FolderTakenError: If the folder of a dry run holds something.

    Example:
        >>> mm.push(direction, Path("runs/to-look-at"))  # doctest: +SKIP
        >>> mm.push(direction, "me/bad-medical-direction").commit  # doctest: +SKIP
    """
    target = _folder(repo_id)
    if target is None and not is_hub_id(repo_id):
        raise ValueError(f"repo_id must be owner/name, or a path of a folder (./name), got {str(repo_id)!r}")
    if target is None and is_offline():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or give a folder (a Path) instead")
    if target is not None:
        refuse_taken(target)
    name = str(repo_id) if target is None else f"<owner>/{target.name}"
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / (target.name if target is not None else name.rpartition("/")[2])
        stage(thing, staged, name, base, note, measured)
        files = tuple(sorted(path.name for path in staged.iterdir()))
        if target is not None:
            with whole_folder(target) as partial:
                shutil.copytree(staged, partial, dirs_exist_ok=True)
            return Pushed(str(target), files)
        return _send(staged, files, name, private=private, replaces=replace_files, branch=branch, message=message)


def _folder(repo_id: str | Path) -> Path | None:
    """The folder that is meant, or None for a repository."""
    if isinstance(repo_id, Path) or repo_id.startswith(("/", ".", "~")):
        return Path(repo_id).expanduser()
    return None


def _send(
    staged: Path, files: tuple[str, ...], name: str, *, private: bool, replaces: bool, branch: str | None, message: str
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with asking(name, branch):
        try:
            there = api.repo_info(name)
        except RepositoryNotFoundError:
            there = None
        if there is not None and private and there.private is False:
            raise HubError(
                f"{name!r} is public; push with private=False if that is meant, or choose another repository"
            )
        held = sorted(set(files) & {entry.rfilename for entry in (there.siblings or [])}) if there is not None else []
        if held and not replaces:
            raise HubError(
                f"{name!r} holds {', '.join(held)} already; push with replace_files=True to put new versions there"
            )
        if there is None:
            api.create_repo(name, private=private)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(staged / file)) for file in files]
        told = message or f"mechmisalign: {', '.join(files)}"
        commit = api.create_commit(name, operations, commit_message=told, revision=branch)
    return Pushed(name, files, str(commit.oid))
