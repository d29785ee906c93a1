"""What is fetched from the Hub: from its cache where it can be, at a known commit, with errors that say what to do.

The client is ``huggingface_hub``: it has the cache, resumes what was broken off, and sends the token of
``hf auth login`` or ``HF_TOKEN``, which is never read, kept or logged here. ``HF_HUB_OFFLINE`` and ``local_files_only``
keep it off the network; so does a path that exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_HUB_ID = re.compile(r"(?!\.{1,2}/)[\w.-]+/(?!\.{1,2}$)[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(ValueError):
    """The Hub did not give what was asked for, or may not be asked."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form ``owner/name``; a path that exists is for the caller to look at first."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def fetch(
    name: str, patterns: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> tuple[Path, str]:
    """Files of a repository, in the cache.

    Args:
        name: ``owner/name``.
        patterns: Which files, as names or with ``*``.
        revision: Branch, tag or commit; the main branch by default.
        local_files_only: Take them from the cache, and do not ask the Hub.

    Returns:
        The folder of the files, and the commit that they are of.

    Raises:
        HubError: If there is no such repository or revision, it may not be read, or the network is needed and may not
            be used or does not answer. Files that the repository lacks are no error here.
    """
    from huggingface_hub import snapshot_download

    with asking(name, revision, local_files_only):
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only)
        )
    if (local_files_only or is_offline()) and not any(any(folder.glob(pattern)) for pattern in patterns):
        raise HubError(_not_cached(name, local_files_only, ", ".join(patterns)))
    return folder, folder.name


def fetch_file(
    name: str, file: str, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[Path, str | None]:
    """One file of a repository, in the cache, and the commit that it is of.

    Raises:
        HubError: As for :func:`fetch`, and if the repository has no such file.
    """
    from huggingface_hub import hf_hub_download

    with asking(name, revision, local_files_only, file):
        path = Path(hf_hub_download(name, file, revision=revision, local_files_only=local_files_only))
    return path, commit_of(path)


def artifact_file(
    path_or_hub_id: str | Path, default: str, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[Path, dict[str, str | None]]:
    """The file of an artifact: a path, a folder that holds ``default``, or a repository that does.

    Returns:
        The local file, and what its header is to say of the repository (nothing for a local one).

    Raises:
        FileNotFoundError: If it is a path, and there is no such file.
        HubError: If it is a repository that does not give it.
        ValueError: If a revision is asked of a local file.
    """
    local = Path(path_or_hub_id).expanduser()
    if local.exists() or local.suffix == Path(default).suffix or not is_hub_id(path_or_hub_id):
        if revision is not None:
            raise ValueError(f"{path_or_hub_id} is a local path and has no revision {revision!r}; leave revision= out")
        found = local / default if local.is_dir() else local
        if not found.is_file():
            raise FileNotFoundError(f"{found} is no file; give one, a folder with a {default}, or a Hub id")
        return found, {}
    path, commit = fetch_file(str(path_or_hub_id), default, revision=revision, local_files_only=local_files_only)
    return path, {"hub_repo": str(path_or_hub_id), "hub_revision": commit}


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the Hub's cache, ``…/snapshots/<commit>/…``; None for any other path."""
    parts = path.parts
    places = [place for place, part in enumerate(parts[:-1]) if part == "snapshots"]
    commit = parts[places[-1] + 1] if places else ""
    return commit if _COMMIT.fullmatch(commit) else None


def is_offline() -> bool:
    """Whether the environment forbids the network (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def asking(
    name: str, revision: str | None = None, local_files_only: bool = False, file: str | None = None
) -> Iterator[None]:
    """While the Hub is asked: its client's errors, as one that says what to do.

    Raises:
        HubError: Instead of them.
    """
    try:
        yield
    except failures() as error:
        raise HubError(explained(error, name, revision, local_files_only, file)) from error


def explained(
    error: BaseException, name: str, revision: str | None, local_files_only: bool = False, file: str | None = None
) -> str:
    """What an error of the Hub's client means and what to do about it; the client's own text is never repeated.

    Args:
        error: As it was caught; those that it came from are looked at too.
        name: The repository.
        revision: What was asked for.
        local_files_only: Whether the network was forbidden by the caller.
        file: The file, if it was one.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    if found := _first(chain, errors.GatedRepoError):
        return (
            f"{name!r} is gated on the Hub: accept its licence at {constants.ENDPOINT}/{name} and log in with "
            f"`hf auth login` (or set HF_TOKEN){_status(found)}"
        )
    if found := _first(chain, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no repository {name!r}, or it is private and you may not read it: check the name, or log in "
            f"with `hf auth login` (or set HF_TOKEN){_status(found)}"
        )
    if _first(chain, errors.RevisionNotFoundError):
        return f"{name!r} on the Hub has no revision {revision!r}: give a branch, a tag or a commit that it has"
    if _first(chain, errors.HFValidationError):
        return f"{name!r} is no name of a repository; owner/name is expected"
    if local_files_only or is_offline() or _first(chain, errors.OfflineModeIsEnabled):
        return _not_cached(name, local_files_only, file)
    missing = _first(chain, errors.EntryNotFoundError)
    if missing is not None and not isinstance(missing, errors.LocalEntryNotFoundError):
        return f"{name!r} on the Hub has no file {file or 'of that name'}; is it the right repository and revision?"
    if refused := _first(chain, errors.HfHubHTTPError):
        return (
            f"the Hub at {constants.ENDPOINT} refused what was asked of {name!r}{_status(refused)}; try again, or see "
            "whether `hf auth whoami` is who you think"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{name!r} was not fetched from the Hub: {error.strerror} ({error.filename})"
    return (
        f"{name!r} is not complete in the cache, and the Hub at {constants.ENDPOINT} could not be reached or broke off "
        f"({type(chain[-1]).__name__}): check your connection and start again, what has come is kept"
    )


def _not_cached(name: str, local_files_only: bool, file: str | None) -> str:
    why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
    what = f"{file} of {name!r}" if file else repr(name)
    return (
        f"the Hub's cache does not hold {what} (or not all of it), and the network may not be used ({why}): fetch it "
        "once without that"
    )


def failures() -> tuple[type[BaseException], ...]:
    """What the client raises: its own errors, and those of the connection (``OSError``, or of its HTTP library)."""
    from huggingface_hub import errors

    kinds: list[type[BaseException]] = [OSError, errors.HfHubHTTPError, errors.HFValidationError]
    for library in ("httpx2", "httpx", "requests"):
        if found := getattr(_loaded(library), "HTTPError", None):
            kinds.append(found)
    return tuple(kinds)


def _loaded(library: str) -> object:
    """A module that the client has loaded, or None: which HTTP library it uses depends on its version."""
    import sys

    return sys.modules.get(library)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        following = error.__cause__ or error.__context__
        if following is None:
            return
        error = following


def _first(chain: Sequence[BaseException], kind: type[BaseException]) -> BaseException | None:
    return next((error for error in chain if isinstance(error, kind)), None)


def _status(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return "" if status is None else f" (status {status})"
