"""The data doctor: check a data tree before days of training are spent on it.

    python scripts/check_data.py voc --data_dir /dataset/VOC2012
    python scripts/check_data.py ade --config my.json --all

It reads the lists, then every image and mask once, and goes on after every fault: the report says
what is wrong, where, how often and what to do. With --config the root, the classes and the task are
that config's, and every step of the task is judged too. Called by hand, before training. It writes
nothing and opens no file outside the root. Exit code: 0 good, perhaps with warnings; 1 errors
found; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import stat
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, UnidentifiedImageError

# Nothing here imports torch: every reading process imports this file, and would wait for it.
from base.base_dataset import IMAGE_FORMATS, BaseDataset, Entry, read_list
from base.task import SETTINGS, Task, make_task
from data_loader import DATA_SETS as registry
from data_loader.splits import (
    HELD_OUT,
    derive,
    list_hash,
    list_name,
    published_file,
    published_lists,
    read_published,
)
from utils.logger import progress
from utils.misc import VOID, UserError, cores, keep_freed_memory, listing, one_sentence_errors
from utils.parse_config import ConfigParser

WORDS = {"train": "training", "val": "validation"}  # of the two splits
KINDS = {"train": "train", "val": "val", "test": "val"}  # image set of a step → its split
EXAMPLES = 5  # places shown per finding
LINES = {"width": 100, "initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}
CHUNK = 128  # files per job of the reading processes
PARALLEL = 8  # jobs; with fewer, starting processes would take longer than the reading
LARGEST_FILE = 2**30  # bytes; no image of a data set comes near
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


# Data set of the command line → its reader
DATA_SETS = {reader.name: reader for reader in registry.values()}


# ----------------------------------------------------------------------------------------- findings
SEVERITIES = ("error", "warning", "note")
_SHARED = "delete it from one of the lists: results on images that were trained on mean nothing"
# Kind of fault → severity, what is wrong, what to do. The words in braces are the split and the
# topics of `BaseDataset.advice`.
# fmt: off
FAULTS = {
    "root": ("error", "root does not exist", "{root}"),
    "names": ("error", "faulty list of class names", "{names}"),
    "list": ("error", "{split} list cannot be read", "{list}"),
    "empty": ("error", "{split} list is empty", "{list}"),
    "line": ("error", "malformed line of the {split} list", "{line}"),
    "twice": ("error", "id that stands twice in the {split} list",
        "delete one of the two; ids are file names without folder and suffix, so give files that "
        "only share their name other names"),
    "garbled": ("error", "{split} file whose name is no UTF-8 text",
        "give image and mask another name; the hashes of lists need text"),
    "overlap": ("error", "training image that is a validation image, too", _SHARED),
    "copy": ("warning", "training image with the content of a validation image", _SHARED),
    "leaves": ("error", "{split} path that leaves the root; its file was not opened",
        "correct the list: paths start at the root and stay below it"),
    "link": ("error", "{split} file that a symbolic link puts outside the root; it was not opened",
        "copy the files into the root or, when the links are meant, pass --follow_links"),
    "followed": ("note", "{split} file that a symbolic link puts outside the root",
        "nothing; --follow_links (data_loader.args.follow_links) allows it"),
    "image missing": ("error", "{split} image does not exist", "{image}"),
    "image damaged": ("error", "{split} image cannot be read",
        "replace the file, which is damaged or no picture: {image}"),
    "enormous": ("warning", "{split} image or mask is enormous",
        "scale both down (the mask by nearest neighbour); every epoch decodes them anew"),
    "mask missing": ("error", "{split} mask does not exist", "{mask}"),
    "mask damaged": ("error", "{split} mask cannot be read",
        "replace the file, which is damaged or no picture: {mask}"),
    "mask mode": ("error", "{split} mask is no 8-bit index mask",
        "save it as a palette or grey PNG of 8 bits whose pixel value is the class; in a colour "
        "picture, map each colour back to its class"),
    "mask JPEG": ("error", "{split} mask is a JPEG",
        "make it anew from its source, as a PNG: JPEG invents classes at every border"),
    "ids": ("error", "label id out of range in a {split} mask",
        "correct the mask or, when the data have own classes, name them all in "
        "data_loader.args.class_names of a config and pass it with --config"),
    "sizes": ("error", "{split} image and mask differ in size",
        "make the mask anew for this image; where width and height are swapped, the image has an "
        "EXIF rotation, which training does not apply: rotate the pixels themselves"),
    "deep": ("warning", "{split} image with more than 8 bits per channel",
        "save it with 8 bits per channel: values above 255 are cut off on reading"),
    "grey": ("note", "{split} image is greyscale", "nothing; it becomes RGB on reading"),
    "mode": ("note", "{split} image is not RGB", "nothing; it becomes RGB on reading"),
    "absent train": ("warning", "class without a pixel in any training mask",
        "add images that show it, or leave it out of the task: it cannot be learnt"),
    "absent val": ("warning", "class without a pixel in any validation mask",
        "add images that show it, or leave it out of the task: its IoU will be 0"),
    "no class": ("note", "{split} mask with nothing but background and void",
        "nothing; no step uses the image"),
    "extra": ("note", "image or mask that no list names",
        "nothing, when the lists are meant so; it is not used"),
    "refusal": ("error", "the data loader refuses", "correct what it names"),
    "step list": ("error", "published list of a step cannot be used",
        "replace the file or delete it; without it the list follows from the masks"),
    "step train": ("error", "step with fewer training images than a batch",
        "choose another task or setting, add images, or lower --batch_size, which counts once "
        "for each process"),
    "step test": ("error", "step without test images",
        "add validation images that show its classes, or choose another task"),
    "step held out": ("error", "step with too few training images to hold a fifth out",
        "set data_loader.args.val.cross_val to false"),
    "step val": ("warning", "step without validation images",
        "add validation images that show its classes; until then its validations say nothing"),
    "step class": ("warning", "class that no training image of its step shows",
        "choose the setting overlap, another order of classes, or add images: all that show it "
        "hold classes of later steps too, so it cannot be learnt"),
    "not compared": ("note", "no comparison with the published lists",
        "nothing; it is made for the complete data set, once its errors are mended"),
    "compared": ("note", "comparison with the published lists", "nothing"),
    "differs": ("warning", "list is not the published one",
        "compare masks and lists with their source: training works, but its results do not "
        "compare with published ones; equal numbers mean other images or another order"),
}
# fmt: on
Found = Iterable[tuple[str, str]]  # key of FAULTS, place


@dataclass(frozen=True)
class Finding:
    """One kind of fault and all its places.

    Attributes:
        severity: one of `SEVERITIES`.
        what: what is wrong.
        where: every place, with list and line.
        advice: what to do.
    """

    severity: str
    what: str
    where: tuple[str, ...]
    advice: str


def collect(known: type[BaseDataset], found: Found, split: str = "") -> list[Finding]:
    """One finding for each kind of fault, in the order of `FAULTS`."""
    places = defaultdict(list)
    for fault, place in found:
        places[fault].append(place)
    words = {topic.removesuffix(f" {split}"): advice for topic, advice in known.advice.items()}
    words["split"] = WORDS.get(split, "")
    return [
        Finding(severity, what.format(**words), tuple(places[fault]), advice.format(**words))
        for fault, (severity, what, advice) in FAULTS.items()
        if fault in places
    ]


def failed(findings: Iterable[Finding]) -> bool:
    """Whether there is an error among them."""
    return any(finding.severity == "error" for finding in findings)


def report(findings: Sequence[Finding], most: int | None) -> str:
    """The findings, errors first, with `most` places each (None: all), and the verdict."""
    lines = []
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        times, shown = len(finding.where), finding.where[:most]
        lines.append(f"\n{finding.severity}: {f'{times:,} × ' * (times > 1)}{finding.what}")
        lines += (f"    {printable(place)}" for place in shown)
        if times > len(shown):
            lines.append(f"    … and {times - len(shown):,} more; --all lists them")
        lines += textwrap.wrap(f"what to do: {finding.advice}.", **LINES)
    counts = {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES}
    words = (f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    so = "cannot be trained on yet" if counts["error"] else "can be trained on"
    return "\n".join([*lines, f"\nverdict: {listing(words)}: this tree {so}"])


def printable(text: str) -> str:
    """Text without control characters and halves of characters, which file names may hold."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


# ------------------------------------------------------------------------------------------- lists
def bare_reader(known: type[BaseDataset], split: str, root: Path) -> BaseDataset:
    """A reader without its list, for the constructor stops at the first fault."""
    reader = object.__new__(known)
    reader.split, reader.root, reader.entries = split, root, []
    return reader


def read_class_names(
    known: type[BaseDataset], root: Path, own: Sequence[Any] | None
) -> tuple[tuple[str, ...], Found]:
    """The class names, background first; numbers where the data set's own cannot be read.

    Raises:
        UserError: `own`, the names of a config, cannot be those of label ids.
    """
    if own is not None:
        if not 2 <= len(own) <= VOID:
            raise UserError(
                f"data_loader.args.class_names has {len(own)} names; between 2 and {VOID} are "
                "possible, background first."
            )
        return tuple(map(str, own)), []
    classes = max(label for steps in known.tables["joint"] for label in steps)
    try:
        names = bare_reader(known, "val", root).read_class_names()
        fault = f"{len(names) - 1} classes instead of {classes}"
        if len(names) == 1 + classes:
            return names, []
    except (UserError, OSError) as error:
        fault = str(error)
    return ("background", *(f"class {k}" for k in range(1, 1 + classes))), [("names", fault)]


def read_entries(reader: BaseDataset) -> tuple[list[Entry], list[tuple[str, str]]]:
    """All entries of a split that mean something, and the lines that do not."""
    try:
        return reader.read_entries(), []
    except (UserError, OSError) as error:
        fault = str(error)
    if not hasattr(reader, "parse"):
        return [], [("list", fault)]
    try:
        lines = read_list(reader.list_file())
    except UserError:
        return [], [("list", fault)]
    entries, malformed = [], []
    for number, line in enumerate(lines, start=1):
        if line.split():
            where = f"{reader.list_file()}, line {number}"
            try:
                entries.append(reader.parse(line, where))
            except UserError:
                malformed.append(("line", f"{where}: '{line.strip()}'"))
    return entries, malformed


def list_faults(entries: Sequence[Entry]) -> Found:
    """Ids that stand twice, names that are no text."""
    first: dict[str, Entry] = {}
    for entry in entries:
        earlier = first.setdefault(entry.id, entry)
        if earlier is not entry:
            yield "twice", f"{entry.where}: {entry.id}, first at {earlier.where}"
        if any("\ud800" <= character <= "\udfff" for character in entry.line):
            yield "garbled", f"{entry.where}: {entry.line}"


def overlap(train: Sequence[Entry], val: Sequence[Entry]) -> Found:
    """Ids that stand in both lists."""
    places = {entry.id: entry.where for entry in val}
    for entry in train:
        if entry.id in places:
            yield "overlap", f"{entry.where}: {entry.id}, also at {places[entry.id]}"


def outside(reader: BaseDataset, follow_links: bool) -> Iterator[tuple[Path, str, str]]:
    """File, fault and place of what lies outside the root, by its path or by a symbolic link."""
    root, real_root = os.path.abspath(reader.root), os.path.realpath(reader.root)
    for entry in reader.entries:
        for path in (entry.image, entry.mask):
            if not _below(os.path.abspath(path), root):
                yield path, "leaves", f"{entry.where}: {path}"
                continue
            with contextlib.suppress(OSError, ValueError):  # impossible names: reading will tell
                if not _below(real := os.path.realpath(path), real_root):
                    fault = "followed" if follow_links else "link"
                    yield path, fault, f"{entry.where}: {path} is {real}"


def _below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def extra_files(files: set[Path], refused: set[Path]) -> Found:
    """Pictures that are not listed, in the folders of the listed files."""
    listed = {os.path.normpath(path) for path in files}
    for folder in sorted({os.path.dirname(os.path.normpath(path)) for path in files - refused}):
        with contextlib.suppress(OSError, ValueError):  # told where its files are missing
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                if path not in listed and os.path.splitext(name)[1].lower() in SUFFIXES:
                    yield "extra", path


def check_lists(
    known: type[BaseDataset], root: Path, follow_links: bool
) -> tuple[dict[str, BaseDataset], set[Path], list[Finding]]:
    """Read and judge both lists.

    Returns:
        The readers, with all entries that mean something; the files that must not be opened; what
        was found.
    """
    readers, refused, findings = {}, set(), []
    for split in WORDS:
        reader = readers[split] = bare_reader(known, split, root)
        reader.entries, found = read_entries(reader)
        if not reader.entries and not found:
            found = [("empty", f"{root}")]
        strays = list(outside(reader, follow_links))
        refused |= {path for path, fault, _ in strays if fault != "followed"}
        found = [*found, *list_faults(reader.entries), *(stray[1:] for stray in strays)]
        findings += collect(known, found, split)
    entries = {split: reader.entries for split, reader in readers.items()}
    files = {path for listed in entries.values() for e in listed for path in (e.image, e.mask)}
    findings += collect(known, [*overlap(**entries), *extra_files(files, refused)])
    return readers, refused, findings


# ----------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Picture:
    """What reading one file told.

    Attributes:
        fault: why it cannot be used; empty when it can.
        missing: there is no such file.
        size: width and height.
        mode: Pillow's name of the kind of pixels, before any conversion.
        format: Pillow's name of the kind of file.
        ids: the values of 8-bit pixels: in a mask, the label ids.
        digest: hash of the file.
    """

    fault: str = ""
    missing: bool = False
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    ids: tuple[int, ...] = ()
    digest: bytes = b""


def look(path: Path) -> Picture:
    """Read and decode one file as training does, whatever it holds."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Picture("it is no file")
        if status.st_size > LARGEST_FILE:
            return Picture(f"it has {status.st_size:,} bytes")
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            image.load()
            ids = np.flatnonzero(image.histogram()) if image.mode in ("P", "L") else ()
            if image.mode != "RGB":
                image.convert("RGB")
    except FileNotFoundError:
        return Picture("it does not exist", missing=True)
    except UnidentifiedImageError:
        return Picture("it is no image" if content else "it is empty")
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        return Picture(str(error) or type(error).__name__)
    return Picture(
        size=image.size,
        mode=image.mode,
        format=str(image.format),
        ids=tuple(map(int, ids)),
        digest=hashlib.sha256(content).digest(),
    )


def look_at_all(paths: Sequence[Path]) -> list[Picture]:
    """`look`, as a job of a reading process."""
    keep_freed_memory()
    return [look(path) for path in paths]


def read_pictures(paths: Iterable[Path]) -> dict[Path, Picture]:
    """Read each file once, on all cores when there are many.

    Raises:
        UserError: a reading process died.
    """
    files = list(dict.fromkeys(paths))
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    workers = min(cores(), len(chunks))
    pictures: list[Picture] = []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            progress(total=len(files), desc="read images, masks", unit="file")
        )
        run = map
        if workers > 1 and len(chunks) >= PARALLEL:
            # spawn, because threads do not survive a fork
            run = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))).map
        try:
            for result in run(look_at_all, chunks):
                pictures += result
                bar.update(len(result))
        except BrokenExecutor:
            raise UserError(
                f"a process that reads images died after {len(pictures)} of {len(files)} files; "
                "most likely an enormous image needs more memory than there is."
            ) from None
    return dict(zip(files, pictures, strict=True))


# ------------------------------------------------------------------------------- images and masks
class Row(NamedTuple):
    """One entry and its two pictures; None: it lies outside the root and was not read."""

    entry: Entry
    image: Picture | None
    mask: Picture | None

    def place(self, what: str) -> str:
        """List, line and file of the "image" or the "mask"."""
        return f"{self.entry.where}: {getattr(self.entry, what)}"


def read_rows(readers: Mapping[str, BaseDataset], refused: set[Path]) -> dict[str, list[Row]]:
    """Read the images and masks of both lists."""
    every = (entry for reader in readers.values() for entry in reader.entries)
    paths = (path for entry in every for path in (entry.image, entry.mask) if path not in refused)
    pictures = read_pictures(paths)
    return {
        split: [Row(e, pictures.get(e.image), pictures.get(e.mask)) for e in reader.entries]
        for split, reader in readers.items()
    }


def row_faults(row: Row, classes: int) -> Found:
    """What is wrong with an image and its mask; label ids are 0…classes and 255."""
    good = []
    for what in ("image", "mask"):
        place, picture = row.place(what), getattr(row, what)
        if picture is None:
            continue
        if picture.missing:
            yield f"{what} missing", place
        elif picture.fault:
            yield f"{what} damaged", f"{place}: {picture.fault}"
        else:
            good.append(what)
            if np.prod(picture.size) > (Image.MAX_IMAGE_PIXELS or np.inf):
                yield "enormous", f"{place} is {_size(picture)}"
    if "image" in good and row.image.mode != "RGB":
        mode, place = row.image.mode, row.place("image")
        if mode == "L":
            yield "grey", place
        else:
            # Pillow's modes of 16 and 32 bits are I, I;16, F and the like.
            yield "deep" if mode[0] in "IF" else "mode", f"{place} has the mode {mode}"
    if "mask" in good:
        place, wrong = row.place("mask"), [k for k in row.mask.ids if classes < k != VOID]
        if row.mask.mode not in ("P", "L"):
            yield "mask mode", f"{place} has the mode {row.mask.mode}"
        elif row.mask.format == "JPEG":
            yield "mask JPEG", place
        elif wrong:
            valid = f"0..{classes} and {VOID} (void)"
            yield "ids", f"{place} holds {listing(wrong, most=10)}; valid are {valid}"
        elif not any(0 < label <= classes for label in row.mask.ids):
            yield "no class", place
    if len(good) == 2 and row.image.size != row.mask.size:
        sizes = f"is {_size(row.image)}, its mask {row.entry.mask} {_size(row.mask)}"
        yield "sizes", f"{row.place('image')} {sizes}"


def _size(picture: Picture) -> str:
    return "×".join(map(str, picture.size))


def copies(train: Sequence[Row], val: Sequence[Row]) -> Found:
    """Training images that equal a validation image of another id, byte by byte."""
    known = {row.image.digest: row for row in val if row.image and row.image.digest}
    for row in train:
        twin = known.get(row.image.digest) if row.image else None
        if twin and twin.entry.id != row.entry.id:
            yield "copy", f"{row.place('image')} equals {twin.place('image')}"


def presence_of(rows: Sequence[Row]) -> np.ndarray:
    """[images, 256] bool: which label ids occur in each mask; none where it cannot be used."""
    presence = np.zeros((len(rows), 256), dtype=bool)
    for index, row in enumerate(rows):
        if row.mask is not None:
            presence[index, list(row.mask.ids)] = True
    return presence


def absent_classes(split: str, presence: np.ndarray, names: Sequence[str]) -> Found:
    """Classes without a pixel; none when no mask could be read."""
    for label in range(1, len(names) if presence.any() else 1):
        if not presence[:, label].any():
            yield f"absent {split}", f"{label} ({names[label]})"


# --------------------------------------------------------------------------------- published lists
def published_faults(
    known: type[BaseDataset],
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> Found:
    """Whether the lists of every task, setting and step are the published ones."""
    published = {
        key.split("/")[1]: value
        for key, value in published_lists().items()
        if key.startswith(f"{known.name}/")
    }
    derived = {}
    for task in every_step(known, names):
        for kind, split in KINDS.items():
            if list_name(task, kind) in published:
                entries = readers[split].entries
                indices = derive(readers[split], presence[split], task, kind)
                ids = [entries[index].id for index in indices]
                derived[list_name(task, kind)] = {"count": len(ids), "sha256": list_hash(ids)}
    return compare_lists(derived, published)


def every_step(known: type[BaseDataset], names: Sequence[str]) -> Iterator[Task]:
    """Every step of every published schedule in every setting."""
    for setting in SETTINGS:
        for name, steps in known.tables.items():
            for step in range(len(steps)):
                args = {"name": name, "setting": setting, "step": step}
                yield make_task(known.name, known.tables, names, **args)


def compare_lists(derived: Mapping[str, Any], published: Mapping[str, Any]) -> Found:
    """Compare two tables of `{name: {"count": …, "sha256": …}}`."""
    equal = {name for name, value in derived.items() if value == published[name]}
    rest = sorted(set(published) - set(derived))
    without = f"; of no task here: {listing(rest)}" if rest else ""
    yield "compared", f"{len(equal)} of {len(derived)} are equal, count and hash{without}"
    for name in sorted(set(derived) - equal):
        counts = f"{derived[name]['count']:,} by the masks, {published[name]['count']:,} published"
        yield "differs", f"{name}: {counts}"


def incomplete(known: type[BaseDataset], readers: Mapping[str, BaseDataset]) -> str:
    """How the numbers of images differ from the complete data set's; empty when they do not."""
    counts = {split: len(reader) for split, reader in readers.items()}
    return listing(
        f"{counts[split]:,} {word} images instead of {known.complete[split]:,}"
        for split, word in WORDS.items()
        if counts[split] != known.complete[split]
    )


# ------------------------------------------------------------------------------------------- steps
def step_lists(
    task: Task,
    lists_dir: str,
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], Found]:
    """Image set of the step → indices, by the user's published file or by the rule."""
    lists, found = {}, []
    for kind, split in KINDS.items():
        path = published_file(task, kind, lists_dir)
        try:
            by_file = read_published(path, readers[split]) if path else None
            by_rule = derive(readers[split], presence[split], task, kind)
            lists[kind] = by_rule if by_file is None else by_file
        except UserError as error:
            lists[kind] = np.empty(0, dtype=np.int64)
            found.append(("step list", str(error)))
    return lists, found


def check_steps(
    config: ConfigParser,
    first: Task,
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
) -> tuple[list[str], Found]:
    """The numbers of images of each step as lines, and the steps that cannot be trained."""
    args = config["data_loader"]["args"]
    batch = args["train"]["batch_size"] * config["trainer"].get("accumulate", 1)
    lines = [f"task {first.name}, {first.setting}, {batch} images per iteration and process:"]
    found = []
    for step in range(len(first.steps)):
        task = replace(first, step=step)
        lists, faults = step_lists(task, args["task"]["idxs_path"], readers, presence)
        counts = {kind: len(indices) for kind, indices in lists.items()}
        if args["val"]["cross_val"]:
            counts["val"] = round(HELD_OUT * counts["train"])
            counts["train"] -= counts["val"]
        words = (f"{count} {WORDS.get(kind, kind)}" for kind, count in counts.items())
        lines.append(f"  step {step}: {listing(words)} images")
        found += faults
        if counts["train"] < batch:
            found.append(("step train", f"step {step}: {counts['train']} of {batch} images"))
        if counts["val"] == 0:
            fault = "step held out" if args["val"]["cross_val"] else "step val"
            found.append((fault, f"step {step}"))
        if counts["test"] == 0:
            found.append(("step test", f"step {step}"))
        ever, now = presence["train"].any(axis=0), presence["train"][lists["train"]].any(axis=0)
        for label in task.new:
            if ever[label] and not now[label]:
                found.append(("step class", f"step {step}: {label} ({task.class_names[label]})"))
    return lines, found


def refusal(config: ConfigParser) -> Found:
    """What training would say before it reads an image."""
    from trainer.run import build_data  # not above, for they import torch
    from utils.distributed import SINGLE

    try:
        build_data(config, SINGLE)
    except UserError as error:
        yield "refusal", str(error)


# -------------------------------------------------------------------------------------------- main
def check_tree(known: type[BaseDataset], config: ConfigParser, steps: bool) -> list[Finding]:
    """Check the tree that a config names; print how large it is.

    Args:
        known: the data set.
        config: its `data_loader.args` say root, classes and task.
        steps: judge the steps of the task, too.

    Raises:
        UserError: an impossible task, setting, step or list of class names.
    """
    args = config["data_loader"]["args"]
    root, own = known.find_root(args["data_dir"]), args["class_names"]
    if not os.path.isdir(root):
        return collect(known, [("root", f"{root}")])
    names, found = read_class_names(known, root, own)
    block = {key: args["task"][key] for key in ("name", "setting", "step", "steps")}
    task = make_task(known.name, known.tables, names, own_classes=own is not None, **block)

    readers, refused, findings = check_lists(known, root, args.get("follow_links", False))
    findings += collect(known, found)
    counts = (f"{len(reader)} {WORDS[split]} images" for split, reader in readers.items())
    print(f"{printable(str(root))}: {listing(counts)}, {len(names) - 1} classes")
    rows = read_rows(readers, refused)
    presence = {split: presence_of(listed) for split, listed in rows.items()}
    for split, listed in rows.items():
        found = [fault for row in listed for fault in row_faults(row, len(names) - 1)]
        found += absent_classes(split, presence[split], names)
        findings += collect(known, found, split)
    findings += collect(known, copies(**rows))

    why = "the classes are the config's own" if own is not None else incomplete(known, readers)
    if not why and failed(findings):
        why = "there are errors"
    found = [("not compared", why)] if why else published_faults(known, readers, presence, names)
    findings += collect(known, found)
    if not failed(findings):
        findings += collect(known, refusal(config))
    if steps:
        lines, found = check_steps(config, task, readers, presence)
        print("\n".join(lines))
        findings += collect(known, found)
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print the report, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, help="which data set, or own data in its layout")
    add("--data_dir", metavar="DIR", help="its root; default: that of the config")
    add("--config", metavar="FILE", help="take root, classes and task from it; judge the steps")
    add("--follow_links", action="store_true", help="read files behind links out of the root")
    add("--all", action="store_true", help="list every place of every finding")
    args = parser.parse_args(argv)
    flags = {"--config": args.config, "--data_dir": args.data_dir}
    given = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    given += ["--follow_links"] if args.follow_links else []
    config = ConfigParser.from_args("train", f"configs/config_{args.data_set}.json", argv=given)
    findings = check_tree(DATA_SETS[args.data_set], config, steps=args.config is not None)
    print(report(findings, None if args.all else EXAMPLES))
    return int(failed(findings))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    with one_sentence_errors():
        sys.exit(main())
