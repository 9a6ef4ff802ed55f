"""Fetching from the Hub through huggingface_hub, and its errors in our words. The token never enters a message."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import DependencyError, QuantoolError, SourceError
from quantool.hub.client import LOG_IN, limit_waiting
from quantool.runtime.progress import Bar, Progress, amount

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: the cache folder of its files, and the bytes of each by name."""

    commit: str
    folder: Path
    sizes: Mapping[str, int]


def list_repository(repo: str, revision: str | None, cache_dir: Path | None) -> Listing:
    """Pin ``revision`` (None: the default branch) to a commit and list its files; fetches config.json only.

    Offline, what the cache holds is the answer.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with hub_errors(repo, revision):
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=["config.json"],
                tqdm_class=_bar_class(None),
            )
        )
        try:
            tree = get_cached_repo_tree(repo, revision=folder.name, cache_dir=cache_dir)
        except CachedRepoTreeNotFoundError:  # offline, and the cache was filled by an older huggingface_hub
            files = [file for file in folder.rglob("*") if file.is_file()]
            sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        else:
            sizes = {file.path: file.size for file in tree}
    return Listing(folder.name, folder, sizes)


def fetch(
    repo: str, listing: Listing, names: tuple[str, ...], cache_dir: Path | None, progress: Progress | None
) -> None:
    """Bring ``names`` into the cache, under a bar when there is a ``progress``.

    Raises DependencyError before the transfer when they do not fit on the disk.
    """
    missing = [name for name in names if not (listing.folder / name).exists()]
    if not missing:
        return
    _check_space(repo, listing, missing)
    if progress is None:
        _download(repo, listing, names, cache_dir, None)
        return
    with progress.bar(f"fetch {repo}", "B") as bar:
        _download(repo, listing, names, cache_dir, bar)


def _download(
    repo: str, listing: Listing, names: tuple[str, ...], cache_dir: Path | None, bar: Bar | None
) -> None:
    from huggingface_hub import snapshot_download

    with hub_errors(repo, listing.commit):
        snapshot_download(
            repo,
            revision=listing.commit,
            cache_dir=cache_dir,
            allow_patterns=[escape(name) for name in names],
            tqdm_class=_bar_class(bar),
        )


def _check_space(repo: str, listing: Listing, missing: list[str]) -> None:
    blobs = listing.folder.parent.parent / "blobs"
    begun = sum(part.stat().st_size for part in blobs.glob("*.incomplete"))
    needed = sum(listing.sizes[name] for name in missing) - begun
    place = next(parent for parent in (listing.folder, *listing.folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DependencyError(
            f"{repo}: {amount(needed, 'B')} to fetch, {amount(free, 'B')} free in {place}",
            hint="free some space, or choose another disk with cache_dir or HF_HOME",
        )


def _bar_class(bar: Bar | None) -> type[Any]:
    """A stand-in for tqdm that prints nothing and moves ``bar`` by the bytes written."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self._bytes = settings.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes and bar is not None:
                self.n += n or 0
                bar.move(self.n, self.total or 0)
            return None

    return Silent


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into SourceError or DependencyError with advice."""
    from huggingface_hub import errors

    limit_waiting()
    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _translated(error, repo, revision) from error
    except errors.HFValidationError as error:
        raise SourceError(f"{repo!r} is neither a folder here nor a Hub id") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of httpx in 1.x, of httpx2 in 2.x
        raise _unreachable(repo, type(error).__name__) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DependencyError(
                f"the disk is full while fetching {repo}",
                hint="what was fetched is kept; free some space, or choose another disk with cache_dir or HF_HOME",
            ) from error
        raise DependencyError(f"cannot fetch {repo}: {error.strerror or type(error).__name__}") from error


def _translated(error: Exception, repo: str, revision: str | None) -> QuantoolError:
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        return _translated(error.__cause__, repo, revision)
    if isinstance(error, errors.GatedRepoError):
        return SourceError(f"{repo} is gated", hint=f"accept its conditions on its page, then {LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"the Hub has no repository {repo!r}, or it is private", hint=f"check the name; {LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{repo} has no revision {revision or 'main'!r}", hint="a branch, a tag, or a full commit hash"
        )
    if isinstance(error, errors.DisabledRepoError):
        return SourceError(f"{repo} is disabled on the Hub")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo)
    if is_offline_mode() or isinstance(error, errors.OfflineModeIsEnabled):
        return DependencyError(
            f"{repo} is not (completely) in the cache, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download " + repo,
        )
    return _unreachable(repo, type(error.__cause__ or error).__name__)


def _refused(error: HfHubHTTPError, repo: str) -> QuantoolError:
    status = error.response.status_code
    if status in (401, 403):
        return DependencyError(f"the Hub does not let this token read {repo} (status {status})", hint=LOG_IN)
    if status == 404:
        return SourceError(f"{repo}: the Hub lacks a file that its own listing names")
    return DependencyError(
        f"the Hub answers {status} for {repo}", hint="try again later; what was fetched is kept"
    )


def _unreachable(repo: str, kind: str) -> DependencyError:
    return DependencyError(
        f"cannot reach the Hub for {repo} ({kind}), and the cache lacks it",
        hint="check the network and HF_ENDPOINT, or name a local folder",
    )
