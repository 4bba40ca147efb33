"""Files that are whole or not there: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PART = ".part"  # ending of files that are being written


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never a half-written one.

    Raises:
        UserError: the file system refuses: it is full, read-only, or the folder may not be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files only their owner may read
        temporary.replace(path)
        _flush(path.parent)  # the rename itself
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; what it held before is intact."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder` or below it."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, data: object) -> None:
    """Write `data` as indented JSON, a list of numbers on one line, atomically."""
    text = json.dumps(data, indent=4, allow_nan=False)
    numbers = r"\[\n\s+([-\d.,e+\s]+?)\n\s+\]"
    text = re.sub(numbers, lambda row: f"[{' '.join(row[1].split())}]", text)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
