"""The data doctor reads every image, mask and saliency map once, on all cores.

Nothing here imports torch: every reading process imports this file, and would wait for it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from copy import copy
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from PIL import Image

from base.base_dataset import BaseDataset, Entry, label_ids
from base.task import Task
from data_loader.saliency import SaliencyMaps
from scripts.doctor.findings import Found
from scripts.doctor.lists import strays
from utils.logger import progress
from utils.misc import BACKGROUND, VOID, UserError, cores, keep_freed_memory, sha256

CHUNK = 128  # files per job of the reading processes
PARALLEL = 8  # jobs; with fewer, starting processes would take longer than the reading


class Inspection(NamedTuple):
    """What reading an image and its mask told.

    Attributes:
        found: kinds of fault and their places.
        ids: the label ids in the mask, without void.
        digest: hash of the image file.
    """

    found: list[tuple[str, str]]
    ids: list[int]
    digest: str


@contextlib.contextmanager
def noted(found: list[tuple[str, str]], what: str, place: str) -> Iterator[None]:
    """Keep what the reader says and go on."""
    try:
        yield
    except UserError as fault:
        if fault.kind != "leaves":  # told with the list
            found.append((fault.kind, str(fault)))
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        found.append((f"{what} damaged", f"{place}: {str(error) or type(error).__name__}"))


def saliency_maps(folder: str | None) -> tuple[SaliencyMaps | None, Found]:
    """The maps of a folder, None when there is none, and what is wrong with it."""
    if folder is None:
        return None, ()
    maps = SaliencyMaps(folder)
    try:
        maps.check()
    except UserError as fault:
        return None, [(fault.kind, str(fault))]
    return maps, ()


def inspect(reader: BaseDataset, maps: SaliencyMaps | None, entry: Entry) -> Inspection:
    """Read an image, its mask and its saliency map as training does, whatever they hold."""
    found: list[tuple[str, str]] = []
    ids: list[int] = []
    digest = ""
    image = mask = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = f"{entry.where}: {entry.image}"
        with noted(found, "image", place):
            image = reader.read_image(entry)
            found += [*enormous(place, image.size), *colours(place, image.mode)]
            image.convert("RGB")
            digest = sha256(entry.image)
        place = f"{entry.where}: {entry.mask}"
        with noted(found, "mask", place):
            mask = reader.read_mask(entry)
            found += enormous(place, mask.shape[::-1])
            ids = reader.ids_of_mask(mask, entry)
            if not {*ids} - ({BACKGROUND} if reader.background else set()):
                found.append(("no class", place))
        if mask is not None and not ids:  # beside a wrong id there may be right ones
            ids = [label for label in label_ids(mask) if label in reader.ids and label != VOID]
        if image is not None and mask is not None:
            with noted(found, "mask", place):
                reader.check_sizes(entry, image.size, mask.shape)
        if maps is not None:
            place = f"{entry.where}: {maps.file(entry)}"
            with noted(found, "saliency map", place):
                if not maps.read(reader, entry, image.size if image is not None else None).any():
                    found.append(("saliency map empty", place))
    return Inspection(found, ids, digest)


def enormous(place: str, size: tuple[int, ...]) -> Found:
    """Pictures of a size at which Pillow warns."""
    if np.prod(size) > (Image.MAX_IMAGE_PIXELS or np.inf):
        yield "enormous", f"{place} is {'×'.join(map(str, size))}"


def colours(place: str, mode: str) -> Found:
    """Images that are not RGB."""
    if mode == "L":
        yield "grey", place
    elif mode != "RGB":
        # Pillow's modes of 16 and 32 bits are I, I;16, F and the like.
        yield "deep" if mode[0] in "IF" else "mode", f"{place} has the mode {mode}"


def inspect_all(
    reader: BaseDataset, maps: SaliencyMaps | None, entries: Sequence[Entry]
) -> list[Inspection]:
    """`inspect`, as a job of a reading process."""
    keep_freed_memory()
    return [inspect(reader, maps, entry) for entry in entries]


def read_pictures(
    readers: Mapping[str, BaseDataset], maps: SaliencyMaps | None = None
) -> dict[str, list[Inspection]]:
    """Read each image and mask of both lists, on all cores when there are many.

    Args:
        readers: of the splits.
        maps: of the training images.

    Raises:
        UserError: a reading process died.
    """
    jobs = []
    for split, reader in readers.items():
        bare = copy(reader)  # without its entries, of which a job has its own
        bare.entries = []
        starts = range(0, len(reader), CHUNK)
        own = maps if split == "train" else None
        jobs += [(split, bare, own, reader.entries[start : start + CHUNK]) for start in starts]
    total, done, workers = sum(map(len, readers.values())), 0, min(cores(), len(jobs))
    inspections: dict[str, list[Inspection]] = {split: [] for split in readers}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=total, desc="read images, masks", unit="image"))
        run: Callable[..., Iterable[list[Inspection]]] = map
        if workers > 1 and len(jobs) >= PARALLEL:
            # spawn, because threads do not survive a fork
            run = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))).map
        splits, *given = zip(*jobs, strict=True) if jobs else ((), (), (), ())
        try:
            for split, result in zip(splits, run(inspect_all, *given), strict=True):
                inspections[split] += result
                done += len(result)
                bar.update(len(result))
        except BrokenExecutor:
            raise UserError(
                f"a process that reads images died after {done} of {total} images; most likely an "
                "enormous image needs more memory than there is."
            ) from None
    return inspections


def followed(reader: BaseDataset) -> Found:
    """Links that --follow_links allows."""
    if reader.follow_links:
        for path, entry, real in strays(reader):
            if not reader.leaves(path):
                yield "followed", f"{entry.where}: {path} is {real}"


def copies(
    readers: Mapping[str, BaseDataset], inspections: Mapping[str, Sequence[Inspection]]
) -> Found:
    """Training images that equal a validation image of another id, byte by byte."""
    train, val = (zip(readers[k].entries, inspections[k], strict=True) for k in ("train", "val"))
    known = {seen.digest: entry for entry, seen in val if seen.digest}
    for entry, seen in train:
        twin = known.get(seen.digest)
        if twin and twin.id != entry.id:
            place = f"{entry.where}: {entry.image}"
            yield "copy", f"{place} equals {twin.where}: {twin.image}"


def presence_of(reader: BaseDataset, inspections: Sequence[Inspection]) -> np.ndarray:
    """[images, label ids] bool: which occur in each mask; none where it cannot be used."""
    columns = {label: column for column, label in enumerate(reader.ids)}
    presence = np.zeros((len(inspections), len(columns)), dtype=bool)
    for row, seen in enumerate(inspections):
        presence[row, [columns[label] for label in seen.ids]] = True
    return presence


def absent_classes(split: str, presence: np.ndarray, task: Task) -> Found:
    """Classes without a pixel; none when no mask could be read."""
    for label in task.classes if presence.any() else ():
        if not presence[:, task.columns([label])].any():
            yield f"absent {split}", f"{label} ({task.class_names[label]})"
