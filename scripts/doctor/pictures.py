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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from base.base_dataset import BaseDataset, Entry
from base.entry_files import label_ids
from base.image_files import DARK, FORMATS, Picture, list_folder
from base.task import Task
from data_loader.saliency import SaliencyMaps
from scripts.doctor.findings import Faults
from scripts.doctor.lists import strays
from utils.errors import UserError
from utils.files import sha256
from utils.labels import BACKGROUND, VOID
from utils.logger import progress
from utils.machine import cores, keep_freed_memory

CHUNK = 128  # files per job of the reading processes
DIM = 4 * DARK  # of 65,536; the same for sensors of 14 bits
PARALLEL = 8  # jobs; with fewer, starting processes would take longer than the reading


class Inspection(NamedTuple):
    """What reading an image and its mask revealed.

    Attributes:
        faults: kinds of fault and their places.
        ids: the label ids in the mask, without void.
        digest: hash of the image file.
    """

    faults: list[tuple[str, str]]
    ids: list[int]
    digest: str


@contextlib.contextmanager
def noted(faults: list[tuple[str, str]], what: str, place: str) -> Iterator[None]:
    """Keep what the reader says and go on."""
    try:
        yield
    except UserError as fault:
        if fault.kind != "leaves":  # stands with the list
            faults.append((fault.kind, str(fault)))
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        faults.append((f"{what} damaged", f"{place}: {str(error) or type(error).__name__}"))


def extra_maps(maps: SaliencyMaps | None, entries: Sequence[Entry]) -> Faults:
    """Images and hidden files in the folder of the maps that are no training image's map."""
    if maps is not None:
        known = {maps.file(entry).name for entry in entries}
        with contextlib.suppress(OSError):  # reported where its files cannot be read
            listed = list_folder(maps.folder)
            for name in (*listed.images, *listed.hidden):
                if name not in known:
                    yield "saliency map extra", f"{maps.folder / name}"


def saliency_maps(folder: str | None) -> tuple[SaliencyMaps | None, Faults]:
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
    faults: list[tuple[str, str]] = []
    ids: list[int] = []
    digest = ""
    size = mask = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = f"{entry.where}: {entry.image}"
        with noted(faults, "image", place):
            picture = reader.open_picture(entry.image, "image", entry)
            size = picture.image.size
            faults += enormous(place, size)
            digest = sha256(entry.image)
            reader.as_rgb(picture, entry)
            faults += kinds(place, picture, entry.image)
        place = f"{entry.where}: {entry.mask}"
        with noted(faults, "mask", place):
            mask = reader.read_mask(entry)
            faults += enormous(place, mask.shape[::-1])
            ids = reader.ids_of_mask(mask, entry)
            if not {*ids} - ({BACKGROUND} if reader.background else set()):
                faults.append(("void" if np.iinfo(mask.dtype).max in mask else "no class", place))
        if mask is not None and not ids:  # beside a wrong id there may be right ones
            ids = [label for label in label_ids(mask) if label in reader.ids and label != VOID]
        if size is not None and mask is not None:
            with noted(faults, "mask", place):
                reader.check_sizes(entry, size, mask.shape)
        if maps is not None:
            place = f"{entry.where}: {maps.file(entry)}"
            with noted(faults, "saliency map", place):
                if not maps.read(reader, entry, size).any():
                    faults.append(("saliency map empty", place))
    return Inspection(faults, ids, digest)


def enormous(place: str, size: tuple[int, ...]) -> Faults:
    """Pictures of a size at which Pillow warns."""
    if np.prod(size) > (Image.MAX_IMAGE_PIXELS or np.inf):
        yield "enormous", f"{place} is {'×'.join(map(str, size))}"


def kinds(place: str, picture: Picture, path: Path) -> Faults:
    """What is uncommon about a picture that can be read."""
    mode = picture.image.mode
    if picture.orientation != 1:
        yield "turned", f"{place} has the EXIF orientation {picture.orientation}"
    if several_frames(path, picture.format):
        yield "frames", place
    if picture.deep:
        yield "dim" if DARK <= picture.peak < DIM else "deep", f"{place} has the mode {mode}"
    elif mode == "L":
        yield "grey", place
    elif mode != "RGB":
        yield "mode", f"{place} has the mode {mode}"


def several_frames(path: Path, kind: str) -> bool:
    """Whether an image file of a format, as Pillow names it, has more frames than the first."""
    if kind not in ("GIF", "PNG", "TIFF", "WEBP", "MPO"):
        return False
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as file:
        return getattr(file, "is_animated", False)
    return False


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


def followed(reader: BaseDataset) -> Faults:
    """Links that --follow_links allows."""
    if reader.follow_links:
        for path, entry, real in strays(reader):
            if not reader.leads_outside(path):
                yield "followed", f"{entry.where}: {path} is {real}"


def copies(
    readers: Mapping[str, BaseDataset], inspections: Mapping[str, Sequence[Inspection]]
) -> Faults:
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


def all_void(faults: list[tuple[str, str]], presence: np.ndarray, task: Task) -> Faults:
    """The faults of a split, where masks with void are an error when none has a class."""
    none = not presence[:, task.columns(task.classes)].any()
    for kind, place in faults:
        yield "all void" if none and kind == "void" else kind, place


def absent_classes(split: str, presence: np.ndarray, task: Task) -> Faults:
    """Classes without a pixel; none when no mask could be read."""
    for label in task.classes if presence.any() else ():
        if not presence[:, task.columns([label])].any():
            yield f"absent {split}", f"{label} ({task.class_names[label]})"
