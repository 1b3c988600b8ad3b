"""A process that has done the imports and forks one child per run: the fresh state of a new process without its seconds.

The server imports and forks, nothing else: no thread, no random draw, no GPU asked for (which would spoil the GPU for its
children), so that a child is what a new process is once its imports are done. It serves one environment, working folder
and thread of the command, dies with that thread, and is started anew where one of them is another.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.imports import uncollected
from bench.train import SIGNALS, handling

MODULES = (  # what every run imports sooner or later; what is missing here is imported by each child
    *("datasets", "bench.run", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
    *("torch._dynamo", "torch._inductor.config", "pandas", "pyarrow.parquet", "evaluate", "sklearn.metrics"),
)
SIZE = {"linux": 1024}.get(sys.platform, 1)  # bytes in the unit of ru_maxrss
_threads = threading.local()


class Server:
    """The command's side: starts the process, gives it runs, one at a time."""

    def __init__(self, modules: tuple[str, ...]):
        self.setting = _setting()
        self.socket, theirs = socket.socketpair()
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.isolate", str(theirs.fileno()), *modules],
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on a terminal reaches it through this process alone, once
            )

    def run(self, job: dict[str, Any], files: tuple[int, ...]) -> tuple[int, int]:
        """One child to its end: its exit code (minus the signal that killed it), and its resident peak in bytes.

        job: JSON for the child, which also inherits the open `files`. Signals are passed on.
        """
        answer = b""
        with tempfile.TemporaryFile("w+") as text, handling(lambda number, frame: self.process.send_signal(number)):
            json.dump(job, text)
            text.seek(0)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self.socket, [b"."], [text.fileno(), *files])
                answer = self.socket.recv(100)
        if answer:
            code, peak = json.loads(answer)
            return code, peak
        _, status, usage = os.wait4(self.process.pid, 0)  # the server itself died
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_maxrss * SIZE

    def serves(self) -> bool:
        """Whether it is alive, for what this process is now."""
        return self.process.poll() is None and self.setting == _setting()

    def close(self) -> None:
        """End it; it has no child now."""
        self.socket.close()
        self.process.terminate()
        self.process.wait()


def server(modules: tuple[str, ...] = ()) -> Server:
    """The server of this thread, which imports `modules` besides; started where there is none that serves."""
    old: Server | None = getattr(_threads, "server", None)
    if old is not None and old.serves():
        return old
    close()
    _threads.server = Server((*MODULES, *modules))
    return _threads.server


@atexit.register
def close() -> None:
    """End this thread's server, so that what it used counts as this command's."""
    if hasattr(_threads, "server"):
        _threads.server.close()
        del _threads.server


def _setting() -> tuple[str, dict[str, str]]:
    return os.getcwd(), dict(os.environ)


def imported(modules: Sequence[str] = MODULES) -> None:
    """Import what children will ask for, before they are forked."""
    with uncollected():
        for name in modules:
            importlib.import_module(name)
    gc.freeze()  # of what was imported nothing is garbage: no child looks through it, or copies its pages


def serve(number: int, modules: list[str]) -> list[int]:
    """The server's side, on the socket with this file number. Returns in each child, with its files; else never."""
    imported(modules)
    child = 0

    def forward(number: int, frame: object) -> None:
        """A signal is the child's; where there is none, or in the child itself, it does what it does to any process."""
        if not child:
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child or os.getpid(), number)

    with socket.socket(fileno=number) as requests, handling(forward):
        while received := _received(requests):
            with held_back():
                child = os.fork()
            if not child:
                return received
            for file in received:
                os.close(file)
            _, status, usage = os.wait4(child, 0)
            child = 0
            with contextlib.suppress(BrokenPipeError):  # the command has died, and this process's next look sees it
                requests.sendall(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * SIZE]).encode())
    sys.exit(0)


def _received(requests: socket.socket) -> list[int]:
    """The files of the next run; none where the command has ended."""
    return socket.recv_fds(requests, 1, 16)[1]


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals wait for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
