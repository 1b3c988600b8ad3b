"""Encoded text on disk, encoded once for all runs: `<cache>/encoded/<recipe>-<rows>.arrow`, read through a memory map.

The name says all that decides the content: how rows are encoded (`recipe`) and which rows. A file is an Arrow stream with
its SHA-256 behind it, which is compared when a process first opens it (about a second per GB); a file that fails is
encoded again. One process encodes while others wait for it. A folder that cannot be written costs a warning and the time
to encode in every run. `PARETUNE_ENCODED_GB` bounds the folder (10 by default; 0 turns it off): what was used longest
ago goes first, the newest file always stays.

python -m bench.encoded_cache [--clear]     what is there; remove it
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import PART, TASK_FACTS, replacing
from bench.registry import cache

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks import Task

log = logging.getLogger("bench")
CHECKSUM = 32  # bytes of the SHA-256 at the end of a file
ABANDONED = 86_400  # seconds after which an unfinished file is a dead process's
PACKAGES = ("transformers", "tokenizers", "sentencepiece")
# Fields of a task that its encoding does not see: which rows there are (their fingerprint says so), what comes after
ROWS = ("splits", "protocol", "holdout", "limit", "shots", "unit", "other", "standin", "revision")
ELSEWHERE = (*ROWS, *TASK_FACTS, "metric", "licence")
SETTINGS = ("model_max_length", "truncation_side", "model_input_names", "special_tokens_map", "chat_template")


def folder() -> Path:
    """Where encoded rows lie."""
    return cache() / "encoded"


def capacity() -> int:
    """Bytes that the folder may take. Raises ValueError for a PARETUNE_ENCODED_GB that is no number."""
    given = os.environ.get("PARETUNE_ENCODED_GB", "10")
    try:
        return int(float(given) * 1e9)
    except (ValueError, OverflowError):
        raise ValueError(f"PARETUNE_ENCODED_GB={given!r} is no number of gigabytes; 0 keeps nothing") from None


def shared(key: str, encode: Callable[[], pa.Table]) -> pa.Table:
    """The table called `key`: out of the cache, or encoded now and put there; encoded alone where nothing can be kept."""
    made: list[pa.Table] = []

    def chunks() -> pa.RecordBatchReader:
        made.append(encode())
        return made[0].to_reader()

    found = stored(key, chunks)
    return found if found is not None else made[0] if made else encode()


def stored(key: str, chunks: Callable[[], pa.RecordBatchReader]) -> pa.Table | None:
    """The table called `key`: out of the cache, or put there now from `chunks`, which are never all in memory.

    Only one process at a time makes it. None where nothing can be kept.
    """
    if not capacity():
        return None
    path = folder() / f"{key}.arrow"
    if (found := _read(path)) is not None:
        return found
    with _alone(path):
        if (found := _read(path)) is not None:
            return found
        reader = chunks()
        try:
            _write(path, reader)
            _evict(path)
        except OSError as error:
            log.warning("rows cannot be kept in %s (%s): each run computes them again; free space there, or set "
                        "PARETUNE_CACHE to a folder that can be written", path.parent, error)  # fmt: skip
            return None
    return _read(path)


def recipe(task: Task, tokenizer: str) -> str:
    """16 hex digits of how rows are encoded: the task's code and options, the tokenizer's `fingerprint`, the libraries."""
    options = {k: v for k, v in dataclasses.asdict(task).items() if k not in ELSEWHERE}
    parts = {
        "task": [type(task).__module__, type(task).__qualname__, options],
        "code": [_content(Path(inspect.getfile(type(task))).parent), _content(Path(__file__).parent, "encoded*.py")],
        "tokenizer": tokenizer,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    return digest(parts)


def fingerprint(processor: Any) -> str:
    """16 hex digits of a tokenizer's vocabulary, rules and settings; wherever it came from, whatever it did before."""
    settings = {name: getattr(processor, name, None) for name in SETTINGS} | {"class": type(processor).__qualname__}
    if (backend := getattr(processor, "backend_tokenizer", None)) is not None:
        return digest(settings | {"content": _rules(backend.to_str())})
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        return digest(settings | {"content": _content(Path(saved), "*")})


@lru_cache(maxsize=8)
def _rules(backend: str) -> str:
    """SHA-256 of a tokenizer written as JSON, but for what its last call left there."""
    content = {k: v for k, v in json.loads(backend).items() if k not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest(parts: dict[str, Any]) -> str:
    """16 hex digits of anything that JSON or `str` can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _content(files: Path, pattern: str = "*.py") -> str:
    digest = hashlib.sha256()
    for file in sorted(files.glob(pattern)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> pa.Table | None:
    """The table in the file, which is marked as used; None where there is no file, or, with a warning, a damaged one."""
    try:
        status = path.stat()
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return _opened(path, status.st_size, status.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: %s; its rows are computed again", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None


@lru_cache(maxsize=32)
def _opened(path: Path, size: int, mtime_ns: int) -> pa.Table:
    """The mapped table, its checksum compared once per process and change of the file. Raises ValueError if it is wrong."""
    del mtime_ns
    import pyarrow as pa

    if size <= CHECKSUM:
        raise ValueError(f"the file is damaged: it has {size} bytes")
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()
    body, checksum = content.slice(0, size - CHECKSUM), content.slice(size - CHECKSUM)
    if hashlib.sha256(memoryview(body)).digest() != checksum.to_pybytes():
        raise ValueError("the file is damaged: its checksum is wrong")
    return pa.ipc.open_stream(body).read_all()


def _write(path: Path, chunks: pa.RecordBatchReader) -> None:
    import pyarrow as pa

    with replacing(path) as part:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, chunks.schema) as stream:
            for chunk in chunks:
                stream.write_batch(chunk)
        with part.open("rb+") as file:
            checksum = hashlib.file_digest(file, "sha256").digest()
            file.write(checksum)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time for each path. Where files cannot be locked several go in, which costs time and nothing else."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _evict(newest: Path) -> None:
    """Remove what was used longest ago until the folder is within `capacity`, and what dead processes left unfinished."""
    room = capacity() - newest.stat().st_size
    for file, status in sorted(_files(), key=lambda entry: entry[1].st_atime_ns, reverse=True):
        room -= status.st_size if file != newest else 0
        if room < 0 and file != newest:
            file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)
    for part in newest.parent.glob(f".*{PART}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _files() -> list[tuple[Path, os.stat_result]]:
    found = []
    for file in folder().glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            found.append((file, file.stat()))
    return found


def main() -> None:
    """Say what the cache holds, or remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", action="store_true", help="remove all encoded rows")
    clear = parser.parse_args().clear
    files = _files()
    total = sum(status.st_size for _, status in files)
    for file, _ in files if clear else []:
        file.unlink(missing_ok=True)
        file.with_suffix(".lock").unlink(missing_ok=True)
    said = "removed" if clear else f"of at most {capacity() / 1e6:,.0f} MB"
    print(f"{folder()}: {len(files)} encoded splits, {total / 1e6:,.1f} MB {said}")


if __name__ == "__main__":
    main()
