"""Locks that hold over the nodes of a cluster and die with their process: a file on the shared folder, and its heartbeat.

``flock`` holds within one machine on some file systems of clusters and fails on others. A claim is a file made by a hard
link, which is atomic on all of them; its holder touches it every few seconds. One whose time has stood still for ``LAPSE``
seconds of the watcher's own clock belongs to nobody any more (clocks of nodes are never compared). On the machine of
the holder its death is seen at once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from quantool.errors import DependencyError

BEAT = 5.0
"""Seconds between two signs of life."""
LAPSE = 60.0
"""Seconds without one after which a claim is nobody's."""
POLL = 0.2
LOST = 3
"""Exit code of a process that finds its claim in other hands: it was stopped for too long."""


@dataclass(frozen=True)
class Holder:
    """Who has a claim."""

    host: str
    process: int
    began: str
    """When that process began, in ticks since its machine did: process numbers are used again."""
    space: str
    """The boot and the process name space in which its number means something."""
    job: str
    """The Slurm job; empty outside of one."""
    since: float
    """Unix time."""
    token: str

    @classmethod
    def myself(cls) -> Holder:
        """The calling process, with a token of its own."""
        own = os.getpid()
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(socket.gethostname(), own, _began(own), _space(), job, time.time(), uuid.uuid4().hex)

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have died; False where this machine cannot tell."""
        return bool(self.space) and self.space == _space() and _began(self.process) != self.began

    def described(self) -> str:
        """``process 17 on node4, Slurm job 81``."""
        return f"process {self.process} on {self.host}" + (f", Slurm job {self.job}" if self.job else "")


def _began(process: int) -> str:
    """Empty for a process that is not there, or only waits to be reaped."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else ""
    return ""


def _space() -> str:
    """Empty where the system does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - no path of the file system
    return ""


def holder_of(path: Path) -> Holder | None:
    """Who has the claim by what its file says, dead or alive; None where there is none or it is damaged."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def living(folder: Path) -> dict[str, Holder]:
    """The claims in ``folder`` by name whose holders live as far as this machine and the time of the last beat tell.

    A holder on another node counts as alive until ``LAPSE`` seconds after its last beat by this machine's clock and the
    file system's, which is good enough to show; ``claimed`` decides by watching.
    """
    found = {}
    for path in sorted(folder.glob("[!.]*.claim")):
        holder = holder_of(path)
        with suppress(OSError):
            if holder is not None and not holder.is_gone and time.time() - path.stat().st_mtime < LAPSE:
                found[path.stem] = holder
    return found


def drop_of_this_machine(path: Path) -> None:
    """Take away a claim of this machine's that a lock of the machine's own proves dead, whatever its name space was."""
    holder = holder_of(path)
    boot = _space().partition(" ")[0]
    if (
        holder is not None
        and holder.space.partition(" ")[0] == boot
        and (boot or holder.host == socket.gethostname())
    ):
        path.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the claim ``path`` (``….claim``) within the block.

    One of a holder that lives is waited for, or with ``wait`` False refused as DependencyError. A process that finds that
    another has taken its claim, because it was stopped for longer than ``LAPSE``, ends at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = Holder.myself()
    _take(path, own, wait=wait)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, own, ended), daemon=True, name=f"claim {path.stem}")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (now := holder_of(path)) is not None and now.token == own.token:
            path.unlink(missing_ok=True)


def _take(path: Path, own: Holder, *, wait: bool) -> None:
    offer = path.with_name(f".{path.name}-{own.token}")
    watched: tuple[tuple[str, int], float] | None = None
    offer.write_text(json.dumps(asdict(own)), encoding="utf-8")
    try:
        while True:
            if _put(offer, path):
                os.utime(path)  # the offer may be hours old: the first sign of life
                return
            holder, beat = holder_of(path), _last_beat(path)
            if holder is None and beat is None:  # released meanwhile
                continue
            seen = (holder.token if holder else "", beat or 0)
            if watched is None or watched[0] != seen:
                watched = (seen, time.monotonic())
            if (holder is not None and holder.is_gone) or time.monotonic() - watched[1] > LAPSE:
                _evict(path, seen[0], own)
                continue
            if not wait and holder is not None and _is_beating(path, holder):
                raise DependencyError(
                    f"{path.stem} is being done by {holder.described()}",
                    hint="wait for it: quantool status OUTPUT",
                )
            time.sleep(POLL)
    finally:
        offer.unlink(missing_ok=True)


def _put(offer: Path, path: Path) -> bool:
    """Give the file ``offer`` the name ``path`` too, unless something has it: by a hard link, or where there are none, a new file.

    What the path says then decides: NFS may have made a link whose answer was lost, and calls the second try an error
    (link(2), BUGS).
    """
    try:
        os.link(offer, path)
    except FileExistsError:
        pass
    except OSError:
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(offer.read_text(encoding="utf-8"))
    there, offered = holder_of(path), holder_of(offer)
    return there is not None and offered is not None and there.token == offered.token


def _is_beating(path: Path, holder: Holder) -> bool:
    """Whether the holder gives no reason to wait for its lapse: it lives here, or its last beat is young."""
    if holder.space == _space():
        return not holder.is_gone
    beat = _last_beat(path)
    return beat is not None and abs(time.time() - beat / 1e9) < LAPSE


def _last_beat(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _evict(path: Path, token: str, own: Holder) -> None:
    """Take a dead holder's file away; another watcher may have been quicker, and its claim is given back."""
    aside = path.with_name(f".{path.name}-evicted-{own.token}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        now = holder_of(aside)
        if now is not None and now.token != token:
            _put(aside, path)
        aside.unlink()


def _beat(path: Path, own: Holder, ended: threading.Event) -> None:
    """Touch the claim until ``ended``; end the process when it is another's."""
    absent = 0
    while not ended.wait(BEAT):
        holder = holder_of(path)
        if holder is not None and holder.token == own.token:
            absent = 0
            with suppress(OSError):
                os.utime(path)
            continue
        absent += 1  # a watcher that gives it back, or a file system that is away for a moment
        if holder is not None or absent * BEAT > LAPSE:
            taker = holder.described() if holder is not None else "nobody"
            print(  # noqa: T201 - the last words of this process
                f"error: {path.stem} was taken over by {taker}: this process was stopped too long",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(LOST)
