"""What the data doctor can find, what to do about it, and the report."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from base.base_dataset import BaseDataset
from utils.errors import listing

SPLIT_NAMES = {"train": "training", "val": "validation"}
ADVICE = textwrap.TextWrapper(
    width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
)
SEVERITIES = ("error", "warning", "note")
_SMALLER = "scale it down, or cut it into parts (masks and maps by nearest neighbour)"
_VOID = (
    "where it shall be foreground, write the label id of its class, such as 1; 255 (in masks of 16 "
    "bits 65,535) is void, which is neither trained on nor counted"
)
_SHARED = "delete it from one of the lists: results on images that were trained on mean nothing"

# Kind of fault → severity, what is wrong, what to do. The terms in braces are the split and the
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
    "garbled": ("warning", "{split} file whose name is no UTF-8 text",
        "give image and mask another name; logs and results show escapes instead"),
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
    "image too large": ("error", "{split} image that is too large to be read", _SMALLER),
    "image depth": ("error", "{split} image whose depth cannot be read faithfully",
        "scale it to 8 bits over the range of the sensor (such as 4,095 for 12 bits), all images "
        "alike; nothing in the file says what is white"),
    "image mode": ("error", "{split} image of colours that cannot be read faithfully",
        "save it as RGB of 8 bits"),
    "enormous": ("warning", "{split} image or mask is enormous",
        "scale both down (the mask by nearest neighbour); every epoch decodes them anew"),
    "mask missing": ("error", "{split} mask does not exist", "{mask}"),
    "mask damaged": ("error", "{split} mask cannot be read",
        "replace the file, which is damaged or no picture: {mask}"),
    "mask too large": ("error", "{split} mask that is too large to be read", _SMALLER),
    "mask mode": ("error", "{split} mask is no index mask",
        "save it as a palette or grey PNG of 8 or 16 bits whose pixel value is the class; in a "
        "colour picture, map each colour back to its class"),
    "mask JPEG": ("error", "{split} mask is a JPEG",
        "make it anew from its source, as a PNG: JPEG invents classes at every border"),
    "ids": ("error", "label id out of range in a {split} mask",
        "correct the mask or, when the data have own classes, name them all in "
        "data_loader.args.class_names of a config and pass it with --config"),
    "sizes": ("error", "{split} image and mask differ in size",
        "make the mask anew for this image; where width and height are swapped, look for an EXIF "
        "orientation, which is applied as viewers do: the mask shall be drawn on what they show"),
    "saliency folder": ("error", "folder of saliency maps does not exist",
        "name the folder that holds a map ID.png for every training image, or leave it out: a "
        "method that can do without maps then does"),
    "saliency map missing": ("error", "{split} image without a saliency map",
        "run the detector that made the others on this image, too, and save its map as ID.png"),
    "saliency map damaged": ("error", "saliency map cannot be read",
        "replace the file, which is damaged or no picture"),
    "saliency map too large": ("error", "saliency map that is too large to be read", _SMALLER),
    "saliency map mode": ("error", "saliency map is no grey PNG",
        "save it as a PNG of 1 bit or grey of 8, 0 where nothing is salient"),
    "saliency map size": ("error", "saliency map and image differ in size",
        "make the map anew for this image, or scale it by nearest neighbour; where width and "
        "height are swapped, the detector has not applied an EXIF orientation, which training "
        "does"),
    "saliency map empty": ("warning", "saliency map that is 0 everywhere",
        "nothing, when there is nothing to see in these images; if they are many, look whether "
        "the detector ran with the right threshold"),
    "saliency map extra": ("note", "file among the saliency maps that is of no training image",
        "nothing; a map is looked for by the name of its image, as ID.png"),
    "dim": ("warning", "{split} image of 16 bits that uses 14 of them at most",
        "scale all images to 8 bits over the range of the sensor (such as 16,383 for 14 bits): as "
        "they are, they are read as dark, with few shades"),
    "deep": ("note", "{split} image with 16 bits per channel",
        "nothing; 0 to 65,535 becomes 0 to 255 on reading"),
    "turned": ("note", "{split} image with an EXIF orientation",
        "nothing, when its mask was drawn on the image as viewers show it: so it is read"),
    "frames": ("note", "{split} image of several frames", "nothing; the first one is read"),
    "grey": ("note", "{split} image is greyscale", "nothing; it becomes RGB on reading"),
    "mode": ("note", "{split} image is not RGB", "nothing; it becomes RGB on reading"),
    "absent train": ("warning", "class without a pixel in any training mask",
        "add images that show it, or leave it out of the task: it cannot be learnt; pixels of 255 "
        "(65,535) are void and no class"),
    "absent val": ("warning", "class without a pixel in any validation mask",
        "add images that show it, or leave it out of the task: its IoU will be 0"),
    "all void": ("error", "no {split} mask with a class, but such with void", _VOID),
    "void": ("warning", "{split} mask with void, but without a class", _VOID),
    "no class": ("note", "{split} mask with nothing but background",
        "nothing; no step uses the image"),
    "hidden": ("note", "hidden file, or one of another system, beside images or masks",
        "nothing; it is not read"),
    "left out": ("warning", "file in the folder of {split} images that has the ending of none",
        "nothing, when it shall not be used; else save it as a JPEG or PNG in the folder itself"),
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
Faults = Iterable[tuple[str, str]]  # key of FAULTS, place


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


def collect(known: type[BaseDataset], faults: Faults, split: str = "") -> list[Finding]:
    """One finding for each kind of fault, in the order of `FAULTS`."""
    places = defaultdict(list)
    for fault, place in faults:
        places[fault].append(place)
    terms = {topic.removesuffix(f" {split}"): advice for topic, advice in known.advice.items()}
    terms["split"] = SPLIT_NAMES.get(split, "")
    return [
        Finding(severity, what.format(**terms), tuple(places[fault]), advice.format(**terms))
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
        lines += ADVICE.wrap(f"what to do: {finding.advice}.")
    counts = {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES}
    texts = (f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    so = "cannot be trained on yet" if counts["error"] else "can be trained on"
    return "\n".join([*lines, f"\nverdict: {listing(texts)}: this tree {so}"])


def printable(text: str) -> str:
    """Text without control characters and halves of characters, which file names may hold."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
