"""Where dsopt keeps its files, and content hashes that are computed once."""

import hashlib
import json
import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's dsopt cache: `$DSOPT_CACHE`, else the platform's cache folder + `dsopt`. Not created here."""
    if override := os.environ.get("DSOPT_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")).expanduser() / "dsopt"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/dsopt").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsopt"


def write_atomically(path: Path, data: bytes, *, parents: bool = True) -> None:
    """Write `data` beside `path` and rename it over: a reader sees the old file or the new one.

    `parents` makes missing directories: for dsopt's own cache, not where a user may have mistyped a path.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp_path(path: Path) -> Path:
    return cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def remember_sha256(path: Path, digest: str) -> None:
    """Record the hash of a file just written, so that the first reader need not hash it again."""
    try:
        entry = {"stamp": _stamp(path), "sha256": digest}
        write_atomically(_stamp_path(path), json.dumps(entry).encode())
    except OSError:
        return  # a read-only cache, or a file replaced meanwhile, costs a rehash next time, nothing else


def hash_content(path: Path) -> str:
    """SHA-256 of a file's content, in hex, read from the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Hashed anew only when inode, size or times have changed."""
    try:
        entry = json.loads(_stamp_path(path).read_bytes())
        if entry["stamp"] == _stamp(path):
            return str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never hashed before, or a damaged entry: hash
    digest = hash_content(path)
    remember_sha256(path, digest)
    return digest
