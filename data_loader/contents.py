"""What the files of a data set hold, by hash, so that a run notices when its data have changed.

A table has a row for each image of a split and a column for its id and each of its files. Files are
read once; their hashes are cached with size and times, by which a changed file is known.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from base.base_dataset import BaseDataset
from base.image_files import LARGEST_FILE
from data_loader.saliency import SaliencyMaps
from utils.errors import UserError, listing
from utils.files import atomic_path
from utils.logger import log, progress_in_threads
from utils.machine import cores

COLUMNS = ("id", "image", "mask", "saliency map")
UNREADABLE = 0  # in place of a hash: there is no such file, or it is none to read
CHUNK = 64  # files per job
THREADS = 8  # at most: hashing holds no lock of the interpreter, reading waits for the disk
NAMED = 3  # examples in a sentence


def contents_table(
    dataset: BaseDataset, cache_dir: str | Path, maps: SaliencyMaps | None = None
) -> np.ndarray:
    """Hashes of the files of a split.

    They are cached; a folder that cannot be written costs a warning.

    Returns:
        [images, columns] int64 in list order, columns as in `COLUMNS`, the last with `maps` alone;
        `UNREADABLE` for what cannot be read.
    """
    entries = dataset.entries
    paths = [path for entry in entries for path in (entry.image, entry.mask)]
    name = f"contents_{dataset.name}_{dataset.split}"
    what = f"hash {dataset.name} {dataset.split} files"
    ids = [_number(entry.id.encode(errors="surrogateescape")) for entry in entries]
    columns = [np.array(ids, np.int64)[:, None]]
    columns.append(_hashes(paths, Path(cache_dir), name, what).reshape(-1, 2))
    if maps is not None:
        paths = [maps.file(entry) for entry in entries]
        columns.append(_hashes(paths, Path(cache_dir), f"{name}_maps", what)[:, None])
    return np.concatenate(columns, axis=1)


def unreadable(table: np.ndarray, row: int) -> str:
    """The kind of file of an image that cannot be read; empty when all can."""
    missing = np.flatnonzero(table[row, 1:] == UNREADABLE)
    return COLUMNS[1 + missing[0]] if len(missing) else ""


def changes(
    here: np.ndarray, there: np.ndarray, names: Sequence[str], only: np.ndarray | None = None
) -> list[str]:
    """What differs between two tables of a split, in phrases for a message.

    Args:
        here: the data as they are.
        there: as they were.
        names: of the images, a name for each row of `here`.
        only: [images there] bool, the rows that are compared; additions and order are then not.

    Returns:
        Such as `5 masks differ (a, b, c and 2 more)`; empty when nothing does.
    """
    places = {number: row for row, number in enumerate(here[:, 0].tolist())}
    rows = np.arange(len(there)) if only is None else np.flatnonzero(only)
    now = np.array([places.get(number, -1) for number in there[rows, 0].tolist()], np.int64)
    kept = now >= 0
    phrases = []
    if gone := int((~kept).sum()):
        phrases.append(f"{gone} image{'s are' if gone > 1 else ' is'} no longer in the list")
    if only is None and (added := len(here) - int(kept.sum())):
        fresh = sorted({*range(len(here))}.difference(now.tolist()))
        examples = listing((names[row] for row in fresh), most=NAMED)
        phrases.append(f"{added} image{'s are' if added > 1 else ' is'} new ({examples})")
    before, after = there[rows[kept]], here[now[kept]]
    for column in range(1, min(here.shape[1], there.shape[1])):
        differs = np.flatnonzero(before[:, column] != after[:, column])
        if len(differs):
            examples = listing((names[now[kept][row]] for row in differs), most=NAMED)
            verb = "differ" if len(differs) > 1 else "differs"
            plural = "s" if len(differs) > 1 else ""
            phrases.append(f"{len(differs)} {COLUMNS[column]}{plural} {verb} ({examples})")
    if only is None and (np.diff(now[kept]) < 0).any():
        phrases.append("the order of the list differs")
    return phrases


def same_rows(here: np.ndarray, there: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """[images here] bool: `flags`, which belong to the rows of `there`, for those of `here`."""
    flagged = {*there[flags.astype(bool), 0].tolist()}
    return np.array([number in flagged for number in here[:, 0].tolist()], bool)


def _number(content: bytes) -> int:
    """A hash of some bytes as an int64 that is not `UNREADABLE`."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big", signed=True) or 1


def _hashes(paths: Sequence[Path], cache_dir: Path, name: str, what: str) -> np.ndarray:
    """[files] int64: the hash of each file, a cached one where size and times are the same."""
    states = np.array([_state(path) for path in paths], np.int64).reshape(-1, 3)
    key = hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
    cache = cache_dir / f"{name}_{key[:16]}.npz"
    hashes = np.zeros(len(paths), np.int64)
    known = np.zeros(len(paths), bool)
    if (stored := _read_cache(cache, len(paths))) is not None:
        known = (stored["states"] == states).all(axis=1)
        hashes[known] = stored["hashes"][known]
    left = np.flatnonzero(~known & (states[:, 0] >= 0))
    if not len(left):
        return hashes

    def read(number: int) -> None:
        hashes[left[number]] = _hash_of(paths[left[number]])

    threads = min(2 * cores(), THREADS)
    progress_in_threads(read, len(left), chunk=CHUNK, threads=threads, desc=what, unit="file")
    try:
        with atomic_path(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, states=states, hashes=hashes)
    except UserError as error:
        log.warning("the hashes of the files: %s The next run reads them again.", error)
    return hashes


def _state(path: Path) -> tuple[int, int, int]:
    """Size and times of a file; −1 for what is no file to read. The second time, unlike the first,
    also changes when a file is replaced by one that keeps its time."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0, 0
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hash_of(path: Path) -> int:
    try:
        return _number(path.read_bytes())
    except OSError:
        return UNREADABLE


def _read_cache(cache: Path, files: int) -> Mapping[str, np.ndarray] | None:
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as stored:
            content = {name: stored[name] for name in ("states", "hashes")}
    except Exception as error:  # np.load raises many kinds on a damaged file; all mean: read again
        log.debug("reading %s: %s", cache, error)
        return None
    shapes = {name: (array.shape, array.dtype.name) for name, array in content.items()}
    good = {"states": ((files, 3), "int64"), "hashes": ((files,), "int64")}
    return content if shapes == good else None
