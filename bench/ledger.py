"""Who computes which run: claims in the results folder, so that any number of workers share a sweep without a server.

A claim is the file `results/.claims/<id>.<generation>`, made with O_EXCL: of two makers one fails. Its owner touches it
while it works. One that is no longer touched is taken over by making the next generation, which again one worker can do
only; the highest generation owns the run, and a worker that was suspended meanwhile sees that it does not. Nothing is ever
compared with a local clock: only with the time that the file system gives a file written just now, and with how long this
process itself has watched a claim without seeing it touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

FOLDER = ".claims"
BEATS = 6  # signs of life per lease
_watched: dict[
    str, tuple[int, float, float]
] = {}  # inode and time of a claim when last seen to change, and when that was


class Claimed(Exception):
    """Another worker computes this run, or took it over from this one."""


class Claim:
    """The right to compute one run: `with Claim(results, id, lease=120): ...`. Raises Claimed where another has it.

    lease: seconds without a sign of life after which others take the run over; on one machine they see a death at once.
    """

    def __init__(self, results: Path, id: str, *, lease: float, cell: str = "", began: float | None = None):
        self.folder, self.id, self.lease = Path(results) / FOLDER, id, lease
        self.note = {
            "cell": cell,
            "began": began,
        }  # for people: which cell, and when the command that asks for it began
        self._released = threading.Event()
        self.lost = ""  # why it is ours no longer

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = newest(self.folder, self.id)
        if before is None:
            self._make(1)
        else:
            self._take_over(before)
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"claim {self.id}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        self._release()

    def check(self) -> None:
        """Raise Claimed unless the run is still ours: to be called before anything is written."""
        here = newest(self.folder, self.id)
        if here is None or not _same(here, self._file):
            self.lost = f"another worker took {self.id} over: this process gave no sign of life for {self.lease:g} s"
            raise Claimed(self.lost)

    def _make(self, generation: int) -> None:
        self.path = self.folder / f"{self.id}.{generation}"
        try:
            self._file = open(self.path, "x+")  # noqa: SIM115  (open for as long as the claim lasts: its inode is ours)
        except FileExistsError:
            raise Claimed(describe(self.path)) from None
        try:
            self._write()
        except OSError:  # a full disk: nobody is to wait for this claim
            self._withdraw()
            raise
        if newest(self.folder, self.id) != self.path:  # made while a higher generation was being withdrawn
            self._withdraw()
            raise Claimed(describe(self.path))

    def _write(self) -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _lock(self._file)} | self.note
        self._file.write(json.dumps(who | {"since": os.fstat(self._file.fileno()).st_mtime}))
        self._file.flush()

    def _take_over(self, before: Path) -> None:
        """Make the next generation; step back unless what it follows still is the claim that was found stale."""
        with _opened(before) as old:
            if old is None or not stale(before, old, self.lease):
                raise Claimed(describe(before))
            self._make(_number(before) + 1)
            if not _same(before, old):
                self._withdraw()
                raise Claimed(f"{self.id} was taken over by another worker")

    def _release(self) -> None:
        """Remove what is older than this claim first, so that its owner never seems to be the newest again."""
        if not self.lost:
            for path in _generations(self.folder, self.id):
                if _number(path) < _number(self.path):
                    path.unlink(missing_ok=True)
        self._withdraw()

    def _withdraw(self) -> None:
        if _same(self.path, self._file):
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            self._file.close()

    def _beat(self) -> None:
        while not self._released.wait(self.lease / BEATS):
            with contextlib.suppress(OSError):  # a file server may stumble; the lease is longer
                try:
                    self.check()
                except Claimed:
                    return
                os.utime(self._file.fileno())


def stale(path: Path, file: IO[str], lease: float) -> bool:
    """Whether the owner of an opened claim is dead: for sure on this machine, else by its silence.

    Silent is who was not seen to touch it for two beats and, by the file system's clock, for a lease; or, where that clock
    was put back, who was not seen to touch it for a whole lease.
    """
    if _owner(file).get("machine", "") == _machine() != "" and _free(file):
        return True
    state = os.fstat(file.fileno())
    inode, touched, since = _watched.get(str(path), (0, 0.0, 0.0))
    if (inode, touched) != (state.st_ino, state.st_mtime):
        since = time.monotonic()
        _watched[str(path)] = state.st_ino, state.st_mtime, since
    silent = now(path.parent) - state.st_mtime > lease
    return time.monotonic() - since > (2 * lease / BEATS if silent else lease)


def holder(results: Path, id: str, lease: float) -> dict[str, Any] | None:
    """Who computes the run `id` (host, pid, cell, began, since, touched); None where nobody does."""
    path = newest(Path(results) / FOLDER, id)
    if path is None:
        return None
    with _opened(path) as file:
        if file is None or stale(path, file, lease):
            return None
        return _owner(file) | {"touched": os.fstat(file.fileno()).st_mtime}


def holders(results: Path, lease: float) -> dict[str, dict[str, Any]]:
    """All runs that somebody computes, by id."""
    ids = {p.stem for p in (Path(results) / FOLDER).glob("*.*") if p.suffix[1:].isdigit()}
    found = {id: holder(results, id, lease) for id in sorted(ids)}
    return {id: owner for id, owner in found.items() if owner is not None}


def now(folder: Path) -> float:
    """What time the file system that holds `folder` gives to a file written now."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def newest(folder: Path, id: str) -> Path | None:
    """The claim of the highest generation."""
    return max(_generations(folder, id), key=_number, default=None)


def describe(path: Path) -> str:
    """Who holds a claim, in words."""
    with _opened(path) as file:
        owner = _owner(file) if file is not None else {}
    return f"running elsewhere: process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _generations(folder: Path, id: str) -> list[Path]:
    return [p for p in folder.glob(f"{id}.*") if p.suffix[1:].isdigit()]


def _number(path: Path) -> int:
    return int(path.suffix[1:])


@contextmanager
def _opened(path: Path) -> Iterator[IO[str] | None]:
    """The file, or None where it is gone. Opening it also makes a network file system ask the server for its times."""
    try:
        file = open(path)  # noqa: SIM115
    except FileNotFoundError:
        yield None
        return
    with file:
        yield file


def _owner(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # made this moment, not written yet
        return {}


def _same(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> str:
    """Lock the file, which the kernel undoes at this process's death; this machine's name, or nothing where it cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return ""
    return _machine()


def _free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _machine() -> str:
    """Names this machine since it was started; nothing where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
