"""Archives of package registries: pinned, verified on use, read by member, never unpacked or run."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench import registry
from bench.registry import Package, Unavailable


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path))


def _placed(client: str, content: bytes, sha256: str = "") -> Package:
    package = Package(client, "toy", "1.0", sha256 or hashlib.sha256(content).hexdigest())  # type: ignore[arg-type]
    path = registry.archive_path(package)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return package


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data/rows.txt", "one\ntwo\n")
        archive.writestr("../outside.txt", "no")
        link = zipfile.ZipInfo("data/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind in (("data/rows.txt", tarfile.REGTYPE), ("../out", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "", 3
            archive.addfile(entry, io.BytesIO(b"abc"))
    return buffer.getvalue()


@pytest.mark.parametrize(("client", "content"), [("pip", _zip()), ("npm", _tar())])
def test_members_are_read_by_name_and_nothing_else(client: str, content: bytes, tmp_path: Path) -> None:
    package = _placed(client, content)
    assert registry.read(package, "data/rows.txt")
    assert "data/rows.txt" in registry.members(package)
    out = registry.extract(package, "data/rows.txt", tmp_path / "deep" / "rows.txt")
    assert out.read_bytes() == registry.read(package, "data/rows.txt")
    for unsafe in ("../outside.txt", "../out", "data/link", "link"):
        with pytest.raises(ValueError, match=r"refused|no member"):
            registry.read(package, unsafe)
    with pytest.raises(ValueError, match=r"data/rows.txt"):
        registry.read(package, "data/row.txt")


def test_a_wrong_hash_is_downloaded_once_more_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    package = _placed("pip", b"broken", sha256="0" * 64)
    calls = []
    monkeypatch.setattr(registry, "_download", lambda p, path: (calls.append(p), path.write_bytes(b"other")))
    with pytest.raises(Unavailable) as error:
        registry.fetch(package)
    assert len(calls) == 1
    assert "0" * 64 in str(error.value) and hashlib.sha256(b"other").hexdigest() in str(error.value)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="npm"):
        registry.fetch(Package("npm", "toy", "1.0", "0" * 64))
