"""Which images belong to a step: the presence table of classes per image, and the rules over it.

The masks are scanned once, in parallel, and the table is cached; overlap, disjoint and sequential
are pure functions of it, so every setting, task and step is answered without reading a mask again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset, bare_id
from base.task import Task
from utils.errors import UserError
from utils.files import atomic_path
from utils.labels import VOID, WIDE_VOID, ranges
from utils.logger import log, progress_in_threads
from utils.machine import cores, keep_freed_memory

HELD_OUT = 0.2  # share of the training images that cross_val validates on
CHUNK = 128  # masks per job of the scan
LOOKED_AT = 64  # masks that are searched for void at most: a few hundredths of a second
PUBLISHED_AS = {"joint": "offline"}  # schedules whose published lists have another name
THREADS = 6  # of the scan at most: a fifth of a mask's time holds the interpreter's lock


# ---------------------------------------------------------------------------- presence of classes
def presence_table(dataset: BaseDataset, cache_dir: str | Path) -> np.ndarray:
    """Which label ids occur in each mask.

    The table is cached in `cache_dir` under a key of the root, the list, and every mask's size and
    times, so a changed data set is scanned anew.

    A folder that cannot be written costs a warning.

    Returns:
        [images, label ids] bool, in list order and in that of `BaseDataset.ids`.

    Raises:
        UserError: a mask is missing, unreadable or holds an id out of range.
    """
    key = _fingerprint(dataset)
    cache = Path(cache_dir) / f"presence_{dataset.name}_{dataset.split}_{key[:16]}.npz"
    if cache.is_file():
        table = _read_cache(cache, key, (len(dataset), len(dataset.ids)))
        if table is not None:
            return table
        log.warning("the class cache %s is damaged: the masks are scanned again", cache)
    table = _scan(dataset)
    try:
        with atomic_path(cache) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, presence=np.packbits(table, axis=1), key=np.array(key))
    except UserError as error:
        log.warning("the class cache: %s The next run scans again.", error)
    return table


def _fingerprint(dataset: BaseDataset) -> str:
    about = f"{dataset.root.resolve()}\n{dataset.ids}\n"
    digest = hashlib.sha256(about.encode(errors="surrogateescape"))
    for entry in dataset.entries:
        try:
            stat = os.stat(entry.mask)
        except OSError:
            raise UserError(f"{entry.where}: mask {entry.mask} does not exist.") from None
        state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        digest.update(f"{entry.line}\t{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_cache(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            packed, stored_key = stored["presence"], str(stored["key"])
    except Exception as error:  # np.load raises many kinds on a damaged file; all mean: scan again
        log.debug("reading %s: %s", path, error)
        return None
    images, ids = shape
    good = packed.shape == (images, -(-ids // 8)) and packed.dtype == np.uint8
    if stored_key != key or not good:
        return None
    return np.unpackbits(packed, axis=1, count=ids).astype(bool)


def _scan(dataset: BaseDataset) -> np.ndarray:
    """The presence table."""
    table = np.zeros((len(dataset), len(dataset.ids)), dtype=bool)
    columns = {label: column for column, label in enumerate(dataset.ids)}

    def scan(row: int) -> None:
        table[row, [columns[label] for label in dataset.load_ids(row)]] = True

    # Threads: Pillow decodes and NumPy counts without the interpreter's lock, and processes would
    # take a fifth as long to start as all of VOC's masks to scan.
    keep_freed_memory()
    progress_in_threads(
        scan,
        len(dataset),
        chunk=CHUNK,
        threads=min(cores(), THREADS),
        desc=f"scan {dataset.name} {dataset.split} masks",
        unit="mask",
    )
    return table


# ------------------------------------------------------------------------------ images of a step
def _holds(presence: np.ndarray, task: Task, labels: Iterable[int]) -> np.ndarray:
    return np.logical_or.reduce(presence[:, task.columns(labels)], axis=1)


def select(presence: np.ndarray, task: Task, kind: str) -> np.ndarray:
    """Indices of the images of one split that belong to the step.

    Args:
        presence: [images, label ids] bool, of the training list for "train", else of the val list.
        task: the step.
        kind: "train" (images with a new class and, unless the setting is "overlap", without one of
            the future), "val" (images with a new class) or "test" (images with a seen class).

    Returns:
        Ascending int64 indices.
    """
    chosen = _holds(presence, task, task.seen if kind == "test" else task.new)
    if kind == "train" and task.setting != "overlap":
        chosen &= ~_holds(presence, task, set(task.classes).difference(task.seen))
    return np.flatnonzero(chosen)


def hold_out(indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Those that are left to train on, and a share of `HELD_OUT` to validate on; both ascending.

    Raises:
        UserError: that share is nothing.
    """
    order = np.random.default_rng(seed).permutation(len(indices))
    held_out = round(HELD_OUT * len(indices))
    if held_out == 0:
        raise UserError(
            f"data_loader.args.val.cross_val: the step has {len(indices)} training images, too "
            "few to hold a fifth out; set it to false."
        )
    return indices[np.sort(order[held_out:])], indices[np.sort(order[:held_out])]


def holding_void(dataset: BaseDataset, rows: np.ndarray) -> tuple[int, int]:
    """How many masks hold void, of how many: of `rows`, evenly spread, `LOOKED_AT` at most."""
    chosen = rows[:: max(1, -(-len(rows) // LOOKED_AT))].tolist()
    masks = map(dataset.load_mask, chosen)
    return sum(bool((mask == dataset.void).any()) for mask in masks), len(chosen)


def void_hint(dataset: BaseDataset, labels: Sequence[int], rows: np.ndarray | None = None) -> str:
    """What void is, where masks hold it and a class was most likely meant; else empty.

    Args:
        labels: label ids of classes that may have been meant.
        rows: which masks; default: all.
    """
    count, looked_at = holding_void(dataset, np.arange(len(dataset)) if rows is None else rows)
    if not count:
        return ""
    return (
        f"; {count} of {looked_at} that were looked at hold {VOID} (in 16 bits {WIDE_VOID}), "
        "which is void, neither trained on nor counted: where it shall be foreground, write "
        f"the label id of its class, such as {labels[0]}"
    )


def without_class(dataset: BaseDataset, presence: np.ndarray, task: Task) -> str:
    """A warning where masks hold no class, or the training masks not all of the step; or empty."""
    absent = [label for label in task.new if not presence[:, task.columns([label])].any()]
    if absent and dataset.split == "train":
        return f"no training mask holds {ranges(absent)}{void_hint(dataset, absent)}"
    rows = np.flatnonzero(~_holds(presence, task, task.classes))
    hint = void_hint(dataset, task.new, rows)
    return f"{len(rows)} {dataset.split} masks hold no class{hint}" if hint else ""


# ---------------------------------------------------------------------------------- published lists
def list_name(task: Task, kind: str) -> str:
    """`overlap_15-1_train_00`: the name of a published list."""
    name = PUBLISHED_AS.get(task.name, task.name)
    return f"{task.setting}_{name}_{kind}_{task.step:02d}"


def published_file(task: Task, kind: str, lists_dir: str | Path) -> Path | None:
    """Path of the published `.npy` list of this step, when the user has it."""
    path = Path(lists_dir) / task.dataset / f"{list_name(task, kind)}.npy"
    return path if task.published and path.is_file() else None


def read_published(path: Path, dataset: BaseDataset) -> np.ndarray:
    """Indices of the images that a published list names.

    Raises:
        UserError: the file is damaged, holds pickled objects, or names an image that the data set's
            own list does not have.
    """
    try:
        names = np.load(path, allow_pickle=False)
    except Exception as error:  # np.load raises many kinds on a damaged file
        raise UserError(f"image list {path} cannot be read: {error}.") from None
    good = isinstance(names, np.ndarray) and names.ndim == 1 and names.dtype.kind == "U"
    if not good or not names.size:
        raise UserError(f"image list {path} must be a one-dimensional, non-empty array of strings.")
    entries = enumerate(dataset.entries)
    known = {name: index for index, entry in entries for name in (entry.line, entry.id)}
    indices = np.empty(len(names), dtype=np.int64)
    for number, name in enumerate(map(str, names)):
        index = known.get(name, known.get(bare_id(name)))
        if index is None:
            raise UserError(
                f"image list {path}, entry {number}: '{name}' is not in the data set's "
                f"{dataset.split} list."
            )
        indices[number] = index
    if len(np.unique(indices)) < len(indices):
        raise UserError(f"image list {path} names an image twice.")
    return indices


@lru_cache(maxsize=1)
def published_lists() -> dict[str, dict]:
    """Count and SHA-256 of the 180 published lists, by `{data set}/{list name}`."""
    return _shipped("published_splits.json")


@lru_cache(maxsize=1)
def published_extra() -> dict[str, list[str]]:
    """Ids that a published list names though the rule does not, by `{data set}/{list name}`.

    One list has any: 18 images without a class of the step, which the others of the same classes
    leave out. It is what the published runs were trained on.
    """
    return _shipped("published_extra.json")


def _shipped(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def derive(dataset: BaseDataset, presence: np.ndarray, task: Task, kind: str) -> np.ndarray:
    """Indices of the images of a step: by the rule, and as the published list has them.

    Images beyond the rule are taken when the list with them is the published one, count and hash:
    on the complete data set and no other.

    Returns:
        Ascending int64 indices.
    """
    indices = select(presence, task, kind)
    extra = published_extra().get(f"{task.dataset}/{list_name(task, kind)}", ())
    places = [index for index, entry in enumerate(dataset.entries) if entry.id in extra]
    whole = np.union1d(indices, places).astype(np.int64)
    ids = [dataset.entries[index].id for index in whole] if places else []
    return whole if equals_published(ids, task, kind) else indices


def list_hash(ids: Sequence[str]) -> str:
    """SHA-256 of bare image ids joined by newlines."""
    return hashlib.sha256("\n".join(ids).encode(errors="surrogateescape")).hexdigest()


def compare_with_published(ids: Sequence[str], task: Task, kind: str) -> str:
    """One phrase for the log: whether a list equals the published one."""
    published = _published(task, kind)
    if published is None:
        return "no published list"
    if equals_published(ids, task, kind):
        return "equal to the published list"
    return f"NOT the published list ({published['count']} images)"


def equals_published(ids: Sequence[str], task: Task, kind: str) -> bool:
    """Whether there is a published list of the step and it has these ids."""
    return _published(task, kind) == {"count": len(ids), "sha256": list_hash(ids)}


def has_published(task: Task, kind: str) -> bool:
    """Whether there is a published list of the step."""
    return _published(task, kind) is not None


def _published(task: Task, kind: str) -> dict[str, Any] | None:
    """Count and hash of the published list, if the step has one."""
    key = f"{task.dataset}/{list_name(task, kind)}"
    return published_lists().get(key) if task.published else None
