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
import os
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

# Nothing here imports torch: every reading process imports this file, and would wait for it.
from base.base_dataset import BaseDataset, Entry, label_ids
from base.task import SETTINGS, ClassNames, Task, make_task
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
from utils.misc import (
    BACKGROUND,
    VOID,
    UserError,
    cores,
    keep_freed_memory,
    listing,
    one_sentence_errors,
    sha256,
)
from utils.parse_config import ConfigParser

WORDS = {"train": "training", "val": "validation"}  # of the two splits
KINDS = {"train": "train", "val": "val", "test": "val"}  # image set of a step → its split
EXAMPLES = 5  # places shown per finding
LINES = {"width": 100, "initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}
CHUNK = 128  # files per job of the reading processes
PARALLEL = 8  # jobs; with fewer, starting processes would take longer than the reading
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
    "mask mode": ("error", "{split} mask is no index mask",
        "save it as a palette or grey PNG of 8 or 16 bits whose pixel value is the class; in a "
        "colour picture, map each colour back to its class"),
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
def read_lists(
    known: type[BaseDataset], root: Path, own: Sequence[str] | None, follow_links: bool
) -> tuple[dict[str, BaseDataset], list[Finding]]:
    """Read and judge both lists.

    Returns:
        The readers, with all entries that mean something; what was found.

    Raises:
        UserError: `own`, the names of a config, cannot be those of label ids.
    """
    readers, findings = {}, []
    for split in WORDS:
        faults: list[UserError] = []
        readers[split] = known(split, str(root), own, follow_links, faults)
        # Both splits have the same names.
        found = [(f.kind, str(f)) for f in faults if f.kind != "names" or split == "val"]
        findings += collect(known, [*found, *garbled(readers[split].entries)], split)
    entries = {split: reader.entries for split, reader in readers.items()}
    outside = {path for reader in readers.values() for path, _, _ in strays(reader)}
    findings += collect(known, [*overlap(**entries), *extra_files(entries, outside)])
    return readers, findings


def garbled(entries: Sequence[Entry]) -> Found:
    """Names that are no text."""
    for entry in entries:
        if any("\ud800" <= character <= "\udfff" for character in entry.line):
            yield "garbled", f"{entry.where}: {entry.line}"


def overlap(train: Sequence[Entry], val: Sequence[Entry]) -> Found:
    """Ids that stand in both lists."""
    places = {entry.id: entry.where for entry in val}
    for entry in train:
        if entry.id in places:
            yield "overlap", f"{entry.where}: {entry.id}, also at {places[entry.id]}"


def strays(reader: BaseDataset) -> Iterator[tuple[Path, Entry, str]]:
    """Files that lie outside the root, by their path or by a symbolic link, and where."""
    root = os.path.join(os.path.realpath(reader.root), "")
    for entry in reader.entries:
        for path in (entry.image, entry.mask):
            with contextlib.suppress(OSError, ValueError):  # impossible names: reading will tell
                if not (real := os.path.realpath(path)).startswith(root):
                    yield path, entry, real


def extra_files(entries: Mapping[str, Sequence[Entry]], outside: set[Path]) -> Found:
    """Pictures that are not listed, in the folders of the listed files."""
    files = {path for listed in entries.values() for e in listed for path in (e.image, e.mask)}
    listed = {os.path.normpath(path) for path in files}
    for folder in sorted({os.path.dirname(os.path.normpath(path)) for path in files - outside}):
        with contextlib.suppress(OSError, ValueError):  # told where its files are missing
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                if path not in listed and os.path.splitext(name)[1].lower() in SUFFIXES:
                    yield "extra", path


# ------------------------------------------------------------------------------- images and masks
class Look(NamedTuple):
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


def look(reader: BaseDataset, entry: Entry) -> Look:
    """Read an image and its mask as training does, whatever they hold."""
    found, ids, digest = [], [], ""
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
    return Look(found, ids, digest)


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


def look_at_all(reader: BaseDataset, entries: Sequence[Entry]) -> list[Look]:
    """`look`, as a job of a reading process."""
    keep_freed_memory()
    return [look(reader, entry) for entry in entries]


def read_pictures(readers: Mapping[str, BaseDataset]) -> dict[str, list[Look]]:
    """Read each image and mask of both lists, on all cores when there are many.

    Raises:
        UserError: a reading process died.
    """
    jobs = []
    for split, reader in readers.items():
        bare = copy(reader)  # without its entries, of which a job has its own
        bare.entries = []
        starts = range(0, len(reader), CHUNK)
        jobs += [(split, bare, reader.entries[start : start + CHUNK]) for start in starts]
    total, done, workers = sum(map(len, readers.values())), 0, min(cores(), len(jobs))
    looks: dict[str, list[Look]] = {split: [] for split in readers}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=total, desc="read images, masks", unit="image"))
        run = map
        if workers > 1 and len(jobs) >= PARALLEL:
            # spawn, because threads do not survive a fork
            run = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))).map
        splits, bares, entries = zip(*jobs, strict=True) if jobs else ((), (), ())
        try:
            for split, result in zip(splits, run(look_at_all, bares, entries), strict=True):
                looks[split] += result
                done += len(result)
                bar.update(len(result))
        except BrokenExecutor:
            raise UserError(
                f"a process that reads images died after {done} of {total} images; most likely an "
                "enormous image needs more memory than there is."
            ) from None
    return looks


def followed(reader: BaseDataset) -> Found:
    """Links that --follow_links allows."""
    if reader.follow_links:
        for path, entry, real in strays(reader):
            if not reader.leaves(path):
                yield "followed", f"{entry.where}: {path} is {real}"


def copies(readers: Mapping[str, BaseDataset], looks: Mapping[str, Sequence[Look]]) -> Found:
    """Training images that equal a validation image of another id, byte by byte."""
    train, val = (zip(readers[k].entries, looks[k], strict=True) for k in ("train", "val"))
    known = {seen.digest: entry for entry, seen in val if seen.digest}
    for entry, seen in train:
        twin = known.get(seen.digest)
        if twin and twin.id != entry.id:
            place = f"{entry.where}: {entry.image}"
            yield "copy", f"{place} equals {twin.where}: {twin.image}"


def presence_of(reader: BaseDataset, looks: Sequence[Look]) -> np.ndarray:
    """[images, label ids] bool: which occur in each mask; none where it cannot be used."""
    columns = {label: column for column, label in enumerate(reader.ids)}
    presence = np.zeros((len(looks), len(columns)), dtype=bool)
    for row, seen in enumerate(looks):
        presence[row, [columns[label] for label in seen.ids]] = True
    return presence


def absent_classes(split: str, presence: np.ndarray, task: Task) -> Found:
    """Classes without a pixel; none when no mask could be read."""
    for label in task.classes if presence.any() else ():
        if not presence[:, task.columns([label])].any():
            yield f"absent {split}", f"{label} ({task.class_names[label]})"


# --------------------------------------------------------------------------------- published lists
def published_faults(
    known: type[BaseDataset],
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
    names: ClassNames,
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


def every_step(known: type[BaseDataset], names: ClassNames) -> Iterator[Task]:
    """Every step of every published schedule in every setting."""
    for setting in SETTINGS:
        for name, steps in known.tables.items():
            for step in range(len(steps)):
                args = {"name": name, "setting": setting, "step": step}
                args["background"] = known.background
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
    counts = {split: len(reader.entries) for split, reader in readers.items()}
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
        for label, column in zip(task.new, task.columns(task.new), strict=True):
            if ever[column] and not now[column]:
                found.append(("step class", f"step {step}: {label} ({task.class_names[label]})"))
    return lines, found


def refusal(config: ConfigParser) -> Found:
    """What training would say before it reads an image."""
    from trainer.build import build_data  # not above, for they import torch
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
    readers, findings = read_lists(known, root, own, args.get("follow_links", False))
    names = readers["val"].class_names
    block = {key: args["task"][key] for key in ("name", "setting", "step", "steps")}
    block |= {"own_classes": own is not None, "background": known.background}
    task = make_task(known.name, known.tables, names, **block)

    counts = (f"{len(reader)} {WORDS[split]} images" for split, reader in readers.items())
    print(f"{printable(str(root))}: {listing(counts)}, {len(task.classes)} classes")
    looks, presence = read_pictures(readers), {}
    for split, reader in readers.items():
        presence[split] = presence_of(reader, looks[split])
        found = [fault for seen in looks[split] for fault in seen.found]
        found += [*followed(reader), *absent_classes(split, presence[split], task)]
        findings += collect(known, found, split)
    findings += collect(known, copies(readers, looks))

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
