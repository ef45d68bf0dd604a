"""Files of the Hugging Face Hub: from its cache, else downloaded into it, with the size before and the digest after.

What is in the cache is taken without a question to the hub, so that a run does not change because a repository did:
`hf download REPO` brings a newer version. A transfer that breaks off is resumed where it stopped, up to five times
without progress. Nothing here retries for ever: every failure is a ValueError of one sentence with the next step.
"""

import os
import socket
import sys
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from rewards.digests import git_sha1_of, sha256_of

_MIB = 1 << 20
_T = TypeVar("_T")


def cached_file(repo: str, file: str, revision: str | None = None) -> Path | None:
    """Return a file of a hub repository from the hub's cache, or None."""
    path = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def cached_folder(repo: str, revision: str | None = None) -> Path | None:
    """Return a repository's snapshot in the hub's cache, perhaps an incomplete one, or None."""
    storage = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"
    name = revision or constants.DEFAULT_REVISION
    reference = storage / "refs" / name
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else name
    folder = storage / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def fetch_file(repo: str, file: str, *, revision: str | None = None, sha256: str | None = None) -> Path:
    """Return one file of a hub repository, from the cache or downloaded into it.

    revision is a branch, tag or commit; None is the main branch. The digest is checked after a download:
    sha256 where it is given, else the one that the hub names; a file with another one is removed from the
    cache. ValueError for that, and where the file is neither in the cache nor to be had, with the next step.
    """
    command = _command(repo, revision, file)
    cached = _guarded(repo, revision, file, command, lambda: cached_file(repo, file, revision))
    if cached is not None:
        return cached

    def download() -> Path:
        _check_name_resolution()
        plan = huggingface_hub.hf_hub_download(repo, file, revision=revision, dry_run=True)
        with _announced(repo, [plan]):
            path = Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        verify(repo, file, path, sha256)
        return path

    return _guarded(repo, revision, file, command, download)


def fetch_folder(
    repo: str,
    choose: Callable[[Collection[str]], Sequence[str]],
    *,
    revision: str | None = None,
    words: str = "",
) -> Path:
    """Return the snapshot's folder with those files of a hub repository that `choose` takes from all their names.

    `words` name about the same files to `hf download`, for the next step in an error. What is in the cache already is not
    downloaded again. The digest of each new file is checked against the
    one that the hub names. ValueError as `fetch_file`, and what `choose` raises.
    """

    command = _command(repo, revision, words)

    def names() -> list[str]:
        _check_name_resolution()
        return huggingface_hub.HfApi().list_repo_files(repo, revision=revision)

    chosen = list(choose(_guarded(repo, revision, "the list of files", command, names)))

    def download() -> Path:
        with _without_progress_bars():
            plans = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=chosen, dry_run=True
            )
        with _announced(repo, plans):
            folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen))
        for plan in plans:
            if not plan.is_cached:
                verify(repo, plan.filename, folder / plan.filename)
        return folder

    return _guarded(repo, revision, "a file", command, download)


@contextmanager
def _announced(repo: str, plans: Sequence[huggingface_hub.DryRunFileInfo]) -> Iterator[None]:
    """Say what is downloaded and its size; of the processes of a machine one speaks, the others wait for its lock."""
    missing = [plan for plan in plans if not plan.is_cached]
    size = sum(plan.file_size or 0 for plan in missing)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if missing and first:
        what = missing[0].filename if len(missing) == 1 else f"{len(missing)} files"
        sys.stderr.write(
            f"downloading {what} of {repo} (commit {missing[0].commit_hash[:8]}): {size / _MIB:,.1f} MiB ({size:,} bytes)"
            f" into {constants.HF_HUB_CACHE}\n"
        )
    with nullcontext() if first and size > _MIB else _without_progress_bars():
        yield


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the hub's progress bars, of which a small file needs none."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def verify(repo: str, file: str, path: Path, sha256: str | None = None) -> None:
    """Raise ValueError, and remove the file from the cache, unless it has the digest that was promised.

    The cache calls a file's content by its ETag: the SHA-256 of a large file, the git blob's SHA-1 of a small one.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    promised = sha256 or (blob.name if path.is_symlink() else "")
    if len(promised) == 64:
        name, found = "SHA-256", sha256_of(path)
    elif len(promised) == 40:
        name, found = "git SHA-1", git_sha1_of(path)
    else:
        return
    if found != promised:
        for place in (path.resolve(), blob, path):
            place.unlink(missing_ok=True)
        raise ValueError(
            f"{file} of {repo} arrived with {name} {found}, expected {promised}; it was removed from the cache, so run the"
            " command again, and compare the digest with the one on the hub's page if it stays so"
        )


def _command(repo: str, revision: str | None, words: str) -> str:
    """The command that downloads these files of a repository into the cache."""
    at = f"--revision {revision}" if revision else ""
    return " ".join(part for part in ("hf download", repo, words, at) if part)


def _check_name_resolution() -> None:
    """Raise ConnectionError at once where the hub's name is not known, which the hub's client tries again for half a minute.

    With a proxy it is the proxy that looks names up.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.is_offline_mode() or host is None or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConnectionError(f"{host}: {error.strerror}") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what the hub's client says of each attempt; the error at the end says it once."""
    level = logging.get_verbosity()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _guarded(repo: str, revision: str | None, what: str, command: str, call: Callable[[], _T]) -> _T:
    """Return what the call returns; ValueError in one sentence for what the hub or the network refuses.

    `command` is the next step where there is no network.
    """
    page = f"{constants.ENDPOINT}/{repo}"
    at = f" at revision {revision}" if revision else ""
    try:
        with _without_warnings():
            return call()
    except errors.HFValidationError as error:
        raise ValueError(
            f"{repo} is no hub id; expected OWNER/NAME, as in stable-diffusion-v1-5/stable-diffusion-v1-5"
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: accept its conditions on {page}, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {revision}; {page}/tree/main lists its branches, tags and commits"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ValueError(
            f"{repo} has no {what}{at}; {page}/tree/{revision or 'main'} lists its files"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no {repo}, or it is private; check the spelling on {page}, or run `hf auth login`"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise ValueError(_unreachable(repo, what, command, error)) from error


def _unreachable(repo: str, what: str, command: str, error: Exception) -> str:
    """The sentence for a file that is not in the cache and cannot be downloaded, or not to its end."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if constants.is_offline_mode():
        why = "HF_HUB_OFFLINE=1 forbids to ask the hub"
    elif isinstance(error, errors.HfHubHTTPError):
        why = f"{constants.ENDPOINT} answers {error.response.status_code}"
    elif isinstance(error, errors.FileMetadataError):
        why = (
            f"{constants.ENDPOINT} does not answer as a hub (is HF_ENDPOINT right, or is a proxy in between?)"
        )
    elif isinstance(error, OSError) and "Consistency check" in str(error):
        why = "the transfer broke off"
    elif isinstance(error, OSError) and error.errno is not None:
        why = f"{error.strerror} ({error.filename or constants.HF_HUB_CACHE})"
    else:
        why = f"{constants.ENDPOINT} cannot be reached"
    return (
        f"{what} of {repo} is not in the hub's cache {constants.HF_HUB_CACHE}, and {why}; run `{command}` or this program where"
        " there is a network, or name a path on this machine"
    )
