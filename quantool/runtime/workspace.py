"""The output folder of a run: lock, logs, finished stages, and files that appear whole or not at all.

::

    OUTPUT/
      .quantool/lock            held while a run works here, alone
      .quantool/claims/         who does which stage, on whichever node of a cluster
      .quantool/stages/*.json   finished stages: key, files, result
      .quantool/work/           shared intermediate files (base, importance matrix, reference)
      logs/                     what the outside tools printed
      <repo>/                   a folder to publish
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import DependencyError
from quantool.records import fingerprint
from quantool.runtime.claims import Holder, claimed, drop_of_this_machine, living
from quantool.runtime.worker import reason

PART = ".part"  # marks a file that is being written
WHOLE_RUN = "run"
"""The claim of a run that does all stages."""


@dataclass(frozen=True)
class Stage:
    """What a result is kept under, and the files that belong to it.

    Without a ``key`` (what the result depends on is not known) nothing is recalled or kept.
    """

    name: str
    key: str | None
    files: tuple[Path, ...] = ()


class Workspace:
    """One output folder. Creates nothing until something is written.

    ``bounded`` is for runs that keep one level at a time on disk: what was released counts as being there.
    """

    def __init__(self, root: Path, *, bounded: bool = False) -> None:
        self.root = root
        self.bounded = bounded
        self.state = root / ".quantool"
        self.stages = self.state / "stages"
        self.work = self.state / "work"
        self.claims = self.state / "claims"
        self.logs = root / "logs"
        self.seconds: dict[str, float] = {}
        """What stages took that this run produced, without those produced within them."""
        self._within = threading.local()
        self._turns: dict[str, threading.RLock] = {}
        self._locked = False
        self._shared = False
        """Whether stages of other processes may be done in this folder at the same time."""
        self._keys: dict[str, str] = {}  # by stage, as the run that holds the lock has used them

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this run; a second run is refused, a dead one leaves no lock behind.

        A run on another machine, and stages of a cluster, are refused as well: see ``claims``.
        """
        handle = self._opened()
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(handle, 64, 0).decode() or "?"
                raise DependencyError(
                    f"{self.root} is in use by another quantool run (process {owner})",
                    hint="wait for it, or give this run another output_path",
                ) from error
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            drop_of_this_machine(self._claim(WHOLE_RUN))
            with claimed(self._claim(WHOLE_RUN), wait=False):
                self._refuse_beside(run=False)
                self._sweep()
                self._keys.clear()
                self._locked = True
                yield
        finally:
            self._locked = False
            os.close(handle)

    @contextmanager
    def share(self, stage: str) -> Iterator[None]:
        """Do one stage of a graph, beside others that other processes and nodes do; nobody else does this one meanwhile."""
        os.close(self._opened())
        with claimed(self._claim(f"stage {stage}"), wait=True):
            self._refuse_beside(run=True)
            self._keys.clear()
            self._locked = self._shared = True
            try:
                yield
            finally:
                self._locked = self._shared = False

    @contextmanager
    def alone(self, names: Iterable[str]) -> Iterator[None]:
        """Let no other thread, nor another process where the folder is shared, produce these results; waits for one that does."""
        with ExitStack() as stack:
            for name in sorted(set(names)):  # in order, or two would wait for each other
                stack.enter_context(self._turns.setdefault(name, threading.RLock()))
                if self._shared:
                    stack.enter_context(claimed(self._claim(f"result {name}"), wait=True))
            yield

    @contextmanager
    def submission(self) -> Iterator[None]:
        """Send stages of this folder to a cluster: nobody else does so meanwhile, and no run works here."""
        os.close(self._opened())
        with claimed(self._claim("submit"), wait=False):
            self._refuse_beside(run=True)
            yield

    def holders(self) -> dict[str, Holder]:
        """Who does what in this folder, by claim."""
        return living(self.claims)

    @property
    def holds_all(self) -> bool:
        """Whether this is a run that does every stage of the folder."""
        return self._locked and not self._shared

    def _claim(self, name: str) -> Path:
        return self.claims / f"{name.replace('/', '-')}.claim"

    def _refuse_beside(self, *, run: bool) -> None:
        """DependencyError while a run does all stages here (``run``), or a cluster some of them."""
        for name, holder in living(self.claims).items():
            if (name == WHOLE_RUN) is run:
                user = "a quantool run" if run else name
                told = f"{self.root} is in use by {user}: {holder.described()}"
                raise DependencyError(told, hint=f"quantool status {self.root}")

    def _opened(self) -> int:
        """The lock's file, in the folder made ready; DependencyError where nothing can be written."""
        try:
            for folder in (self.work, self.stages, self.claims, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.state / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DependencyError(f"cannot write to {self.root}: {error.strerror}") from error

    def _sweep(self) -> None:
        """Remove what a killed run was still writing; others' files that end alike lack the leading dot.

        Output folders inside this one are left alone: a run may be writing there.
        """
        for place, folders, files in os.walk(self.root):
            folder = Path(place)
            if folder != self.root and self.state.name in folders:
                folders.clear()
                continue
            for name in [name for name in (*folders, *files) if name.startswith(".") and name.endswith(PART)]:
                _remove(folder / name)
            folders[:] = [name for name in folders if (folder / name).is_dir()]

    def recall(self, name: str, key: str) -> dict[str, Any] | None:
        """The result of stage ``name`` if it was finished with this ``key`` and its files are as it left them."""
        self._require_alone(name, key)
        saved = self._saved(self._record(name))
        if saved is None or saved["key"] != key:
            return None
        released = saved["released"] if self.bounded else []
        intact = all(
            _stamp(self.root / path) in ((stamp, None) if path in released else (stamp,))
            for path, stamp in saved["files"].items()
        )
        result: dict[str, Any] = saved["result"]
        return result if intact else None

    def keep(self, name: str, key: str, files: Iterable[Path], result: dict[str, Any]) -> None:
        """Record stage ``name`` as finished; ``files`` must have their final names."""
        self._require_alone(name, key)
        stamps = {str(self._relative(path)): _stamp(path) for path in files}
        self._save(self._record(name), {"name": name, "key": key, "files": stamps, "result": result})

    def _require_alone(self, name: str, key: str) -> None:
        """Two results under one name would be done anew by turns, each time that the other was recalled.

        No key marks files of a stage that is not finished.
        """
        if key and self._locked and self._keys.setdefault(name, key) != key:
            raise RuntimeError(f"stage {name} is used with two keys in one run")

    def forget(self, name: str) -> None:
        """Let the stage be done again."""
        self._record(name).unlink(missing_ok=True)

    def stage(
        self, name: str, key: str, produce: Callable[[], tuple[Iterable[Path], dict[str, Any]]]
    ) -> dict[str, Any]:
        """The recalled result of the stage, or that of ``produce`` (which returns its files and its result)."""
        if (result := self.recall(name, key)) is not None:
            return result
        with self.alone([name]):
            result = self.recall(name, key)
            if result is None:
                with self.timed(name):
                    files, result = produce()
                self.keep(name, key, files, result)
        return result

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the seconds of a stage; those of stages within it, in the same thread, are theirs alone."""
        outer, started = getattr(self._within, "seconds", 0.0), time.monotonic()
        self._within.seconds = 0.0
        try:
            yield
            self.seconds[name] = time.monotonic() - started - self._within.seconds
        finally:
            self._within.seconds = outer + time.monotonic() - started

    def together(
        self,
        stages: Sequence[Stage],
        produce: Callable[[list[int]], Sequence[dict[str, Any]]],
        *,
        anew: bool = False,
    ) -> list[dict[str, Any]]:
        """The results of several stages; those not recalled come from one call of ``produce``.

        It is given the numbers of the stages that are missing, and returns their results in that order. ``anew`` recalls
        none.
        """
        results = {} if anew else self._recalled(stages)
        waited = [stage.name for number, stage in enumerate(stages) if number not in results]
        with self.alone(waited):
            if waited and not anew:
                results = self._recalled(stages)
            missing = [number for number in range(len(stages)) if number not in results]
            for number, result in zip(missing, produce(missing) if missing else (), strict=True):
                results[number] = result
                stage = stages[number]
                if stage.key is not None and not (anew and self.recall(stage.name, stage.key) == result):
                    self.keep(stage.name, stage.key, stage.files, result)
        return [results[number] for number in range(len(stages))]

    def _recalled(self, stages: Sequence[Stage]) -> dict[int, dict[str, Any]]:
        """What was kept of the stages, by their numbers."""
        return {
            number: result
            for number, stage in enumerate(stages)
            if stage.key is not None and (result := self.recall(stage.name, stage.key)) is not None
        }

    def release(self, paths: Iterable[Path]) -> None:
        """Delete files whose stages stay finished without them, for a ``bounded`` workspace."""
        paths = list(paths)
        self._mark({str(self._relative(path)) for path in paths}, released=True)
        for path in paths:
            path.unlink(missing_ok=True)

    def reclaim(self, paths: Iterable[Path]) -> None:
        """Take ``release`` back: the stages of files that are gone have to be done again."""
        self._mark({str(self._relative(path)) for path in paths}, released=False)

    def _mark(self, names: set[str], *, released: bool) -> None:
        """Note in the record of every stage that has one of these files whether it may be missing."""
        for record in sorted(self.stages.glob("*.json")):
            saved = self._saved(record)
            if saved is not None and (concerned := names & saved["files"].keys()):
                before = set(saved["released"])
                marked = sorted(before | concerned if released else before - concerned)
                self._save(record, saved | {"released": marked})

    def _save(self, record: Path, saved: dict[str, Any]) -> None:
        content = {name: value for name, value in saved.items() if name != "digest"}
        content.setdefault("released", [])
        write_text(record, json.dumps(content | {"digest": fingerprint(content)}))

    def _saved(self, record: Path) -> dict[str, Any] | None:
        """A stage's record, or None where there is none or it is not, to the letter, what ``_save`` wrote."""
        try:
            saved = json.loads(record.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            raise DependencyError(f"cannot read {self.stages}: {error.strerror}") from error
        if not isinstance(saved, dict):
            return None
        content = {name: value for name, value in saved.items() if name != "digest"}
        return content if saved.get("digest") == fingerprint(content) else None

    def recorded(self) -> dict[str, list[Path]]:
        """The files of every stage that was ever finished here, by its name; whether they are still there or not."""
        files: dict[str, list[Path]] = {}
        for record in sorted(self.stages.glob("*.json")):
            try:
                saved = json.loads(record.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):  # damaged: it names nothing
                continue
            match saved:
                case {"name": str(name), "files": dict(stamps)}:
                    files[name] = [self.root / path for path in stamps]
        return files

    def _relative(self, path: Path) -> Path:
        """Relative to the output folder, which may be moved; absolute where it lies elsewhere."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path.absolute()

    def _record(self, name: str) -> Path:
        return self.stages / f"{name.replace('/', '-')}-{fingerprint(name)[:8]}.json"


def _stamp(path: Path) -> list[int] | None:
    """Size and modification time in ns: what changes when somebody touches a file; None when it is not there."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; on success it is synced and renamed, on failure removed.

    Works for a file or a folder. Raises DependencyError when the disk is full or the folder not writable.
    """
    part = path.with_name(f".{path.name}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        _sync(part)
        if path.is_dir() and part.is_dir():
            shutil.rmtree(path)
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise DependencyError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):  # the first error is the one to tell; leftovers are swept by the next run
            _remove(part)


def link_file(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link, or a copy where the file system has none."""
    with written(target) as part:
        try:
            part.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, part)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that it appears whole or not at all."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
