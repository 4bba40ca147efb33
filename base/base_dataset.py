"""What a raw data set offers: images, index masks, class names. It knows nothing of steps.

Subclassed once per data set in `data_loader/`; used by `IncrementalDataset` and the presence scan.
"""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from base.image_files import Listing, Picture, decode, list_folder, to_rgb
from base.task import ClassNames, ids_of
from utils.errors import UserError, listing
from utils.labels import BACKGROUND, VOID, WIDE_VOID, ranges, void_id
from utils.text import lines_of, path_of

NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: control characters, halves, line ends
# Pillow's names of what a mask may be: palette or grey of 8 bits, grey of 16.
MASK_MODES = ("P", "L", "I;16", "I;16B", "I")


@dataclass(frozen=True)
class Entry:
    """One image of a list.

    Attributes:
        id: bare name, such as 2007_000032.
        line: what published lists call it: for VOC's training images the line of the list.
        image: path of the image.
        mask: path of the index mask.
        where: list file and line, for messages.
    """

    id: str
    line: str
    image: Path
    mask: Path
    where: str

    def fault(self, words: str, kind: str) -> UserError:
        """What is wrong with it, told with its place in the list."""
        return UserError(f"{self.where}: {words}.", kind)

    def of_file(self, fault: UserError, what: str, path: Path) -> UserError:
        """What is wrong with a file, as `base/image_files.py` has it, told with its name."""
        return self.fault(f"{what} {path} {fault}", f"{what} {fault.kind}")


class BaseDataset(ABC):
    """The images and masks of one split ("train" or "val") of a data set on disk.

    A subclass is all there is to say about a data set. It sets the class attributes, implements
    `read_entries` and `read_class_names`, and has a line in `data_loader/__init__.py`.

    The pixel values of a mask are label ids, and the largest number that they could be is void: 255
    in masks of 8 bits, 65,535 in those of 16. A tree may hold both; they are handed out in 8 bits
    when every label id fits below 255, else in 16.

    Attributes:
        name: short name, a part of file names ("voc").
        default_root: where the data lie when nobody says otherwise.
        root_variable: environment variable that may say otherwise.
        tables: its published schedules: label ids of each step.
        complete: images of each split when none is missing.
        advice: what to do where something is missing or faulty, by topic or by topic and split;
            the topics are those of `scripts/doctor/findings.py`.
        background: whether label id 0 is background; else every pixel is of a class or void.
        evaluation: how images are evaluated unless `transform` is false: "crop", the shorter side
            resized to the crop size and the centre cropped, "whole", as they are, or resized to
            (height, width).
        future: what pixels of future classes count as in published tests: 0, background, or 255,
            nothing.
        unlabelled: whether label id 0 says that nobody labelled the pixel; some papers do not
            count it.
        class_names: name by label id.
        ids: the label ids that have a name, ascending.
        void: label id of void in the masks that are handed out.
        listings: what lies in the folders whose images are the entries, where no list names them.
    """

    name: ClassVar[str]
    default_root: ClassVar[str]
    root_variable: ClassVar[str]
    tables: ClassVar[Mapping[str, Sequence[Sequence[int]]]]
    complete: ClassVar[Mapping[str, int]]
    advice: ClassVar[Mapping[str, str]] = {}
    background: ClassVar[bool] = True
    evaluation: ClassVar[str | tuple[int, int]] = "crop"
    future: ClassVar[int] = BACKGROUND
    unlabelled: ClassVar[bool] = False

    def __init__(
        self,
        split: str,
        data_dir: str | None = None,
        class_names: Sequence[str] | None = None,
        follow_links: bool = False,
        faults: list[UserError] | None = None,
    ):
        """Read the list of a split; no image is opened.

        Args:
            split: "train" or "val".
            data_dir: the root; default: the environment variable, then `default_root`.
            class_names: names of the label ids 0, 1, 2 …; default: the data set's own.
            follow_links: accept files that symbolic links put outside the root.
            faults: takes the faults of names and list, the first of which is raised without it;
                what means something is read nevertheless.

        Raises:
            UserError: the root or a list is missing, a list is empty, names an image twice, or
                names a path outside the root.
        """
        if class_names is not None:
            _check_class_names(class_names)
        self.split, self.follow_links, self.faults = split, follow_links, faults
        self.root = self.find_root(data_dir)
        if not self.root.is_dir():
            raise UserError(
                f"the data set's folder {self.root} does not exist; name it with --data_dir, "
                f"data_loader.args.data_dir or the environment variable {self.root_variable}.",
                "root",
            )
        try:
            names: ClassNames = tuple(class_names or ()) or self.read_class_names()
            self._check_text(names)
        except UserError as fault:
            self.tell(fault, "names")
            names = self.numbered_names()
        self.class_names, self.ids = names, ids_of(names)
        self.void = void_id(self.ids)
        self._valid = frozenset(self.ids)
        self.listings: dict[Path, Listing] = {}
        self.entries: list[Entry] = []
        try:
            self.entries = self.read_entries()
        except UserError as fault:
            self.tell(fault, "list")
        else:
            self._check_entries()

    def tell(self, fault: UserError, kind: str = "") -> None:
        """Raise a fault of names or list, or keep it where all of them are wanted."""
        fault.kind = fault.kind or kind
        if self.faults is None:
            raise fault
        self.faults.append(fault)

    @classmethod
    def find_root(cls, data_dir: str | None = None) -> Path:
        """The root: `data_dir`, then the environment variable, then the default."""
        if data_dir:
            return Path(path_of(data_dir, "--data_dir"))
        given = os.environ.get(cls.root_variable)
        return Path(path_of(given, cls.root_variable) if given else cls.default_root)

    @classmethod
    def known_names(cls, data_dir: str | None = None) -> ClassNames:
        """The data set's class names where its images are not needed, numbers without the root."""
        bare = cls.__new__(cls)
        bare.root = cls.find_root(data_dir)
        try:
            return bare.read_class_names()
        except UserError:
            return cls.numbered_names()

    @classmethod
    def numbered_names(cls) -> ClassNames:
        """A name for every class of the published schedules, where nobody knows a better one."""
        labels = {label for steps in cls.tables.values() for ids in steps for label in ids}
        first = {BACKGROUND: "background"} if cls.background else {}
        return first | {label: f"class {label}" for label in labels}

    @abstractmethod
    def read_class_names(self) -> ClassNames:
        """Class names by label id: of 0, 1, 2 …, or a mapping from any ids."""

    @abstractmethod
    def read_entries(self) -> list[Entry]:
        """The images of the split, in list order."""

    def list_images(self, folder: Path) -> list[Path]:
        """The images of a folder, sorted by name; for `read_entries` where no list names them.

        Raises:
            UserError: it cannot be listed.
        """
        try:
            found = self.listings[folder] = list_folder(folder)
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
            raise UserError(f"the image folder {folder} {reason}.") from None
        return [folder / name for name in found.images]

    @property
    def left_out(self) -> str:
        """What of the folders that were listed is no image, in words; mostly empty."""
        words = ((folder, found.left_out) for folder, found in self.listings.items())
        return listing(f"{folder}: {left_out}" for folder, left_out in words if left_out)

    def _check_entries(self) -> None:
        if not self.entries and not self.faults:
            what = f"{self.root}: the {self.split} list of the data set is empty"
            without = f" without what is left out of {self.left_out}" if self.left_out else ""
            self.tell(UserError(f"{what}{without}.", "empty"))
        first: dict[str, Entry] = {}
        for entry in self.entries:
            for path in filter(self.leaves, (entry.image, entry.mask)):
                what = f"the path {path} leaves the data set's folder {self.root}"
                self.tell(entry.fault(f"{what}; every file must lie inside it", "leaves"))
            earlier = first.setdefault(entry.id, entry)
            if earlier is not entry:
                what = f"image {entry.id} stands in the list twice, first at {earlier.where}"
                if earlier.image != entry.image:
                    what += (
                        f" ({earlier.image} and {entry.image}); answers, saliency maps and "
                        "memory.json go by the name alone, so rename one, with its mask"
                    )
                self.tell(entry.fault(what, "twice"))

    def _check_text(self, names: ClassNames) -> None:
        """Class names are shown and compared, so they are text; names of files may be any bytes."""
        for label in ids_of(names):
            if any(unicodedata.category(character) in NO_TEXT for character in names[label]):
                raise UserError(
                    f"the name of class {label} of {self.root} is {names[label]!r}, with control "
                    "characters or what is no UTF-8; correct it, or save the file that it is from "
                    "as UTF-8."
                )

    def leaves(self, path: Path) -> bool:
        """Whether a path leads out of the root by its own words."""
        if ".." not in path.parts:
            return False
        return not os.path.abspath(path).startswith(os.path.join(os.path.abspath(self.root), ""))

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Read one image, as of `read_image`, and its mask, as of `load_mask`.

        Raises:
            UserError: a file is missing or unreadable, the sizes differ or an id is out of range.
        """
        entry = self.entries[index]
        image = self.read_image(entry)
        mask = self.load_mask(index)
        self.check_sizes(entry, image.size, mask.shape)
        return image, mask

    def read_image(self, entry: Entry) -> Image.Image:
        """An image as the network sees it: upright, RGB of 8 bits.

        Raises:
            UserError: the file is missing or unreadable, or there is no faithful way.
        """
        return self.as_rgb(self.open_picture(entry.image, "image", entry), entry)

    def as_rgb(self, picture: Picture, entry: Entry) -> Image.Image:
        """`to_rgb` of the decoded image of an entry, whose faults name it."""
        try:
            return to_rgb(picture)
        except UserError as fault:
            raise entry.of_file(fault, "image", entry.image) from None

    def check_sizes(self, entry: Entry, image: tuple[int, int], mask: tuple[int, ...]) -> None:
        """Raise `UserError` when width and height of an image are not those of its mask, [H, W]."""
        if image == mask[::-1]:
            return
        words = (
            f"image {entry.image} is {image[0]}×{image[1]} pixels, but its mask {entry.mask} "
            f"is {mask[1]}×{mask[0]}"
        )
        if image == mask:
            for what, path in (("image", entry.image), ("mask", entry.mask)):
                picture = self.open_picture(path, what, entry)
                if picture.swapped:
                    words += (
                        f"; the {what} has the EXIF orientation {picture.orientation}, which is "
                        "applied, and without which both would fit: where the mask was drawn on "
                        f"the pixels as they are stored, delete that tag from the {what}, else "
                        "make the mask anew"
                    )
        raise entry.fault(words, "sizes")

    def load_mask(self, index: int) -> np.ndarray:
        """Read one mask: [H, W] label ids, uint8 with 255 = void, or uint16 with 65,535 = void."""
        entry = self.entries[index]
        mask = self.read_mask(entry)
        # One more than an id, void becoming 0 as the numbers wrap: without gaps between the ids, no
        # valid one exceeds their number. Every sample is checked, and the ids themselves take more.
        if self.ids[-1] >= len(self.ids) or (mask + mask.dtype.type(1)).max() > len(self.ids):
            self.ids_of_mask(mask, entry)
        if self.void == VOID:
            return mask.astype(np.uint8, copy=False)  # which makes 255 of 65,535
        wide = mask.astype(np.uint16, copy=False)
        if mask.dtype == np.uint8:
            wide[mask == VOID] = WIDE_VOID
        return wide

    def load_ids(self, index: int) -> list[int]:
        """The label ids in one mask, as `ids_of_mask` has them, for the presence scan."""
        entry = self.entries[index]
        return self.ids_of_mask(self.read_mask(entry), entry)

    def ids_of_mask(self, mask: np.ndarray, entry: Entry) -> list[int]:
        """The label ids in what `read_mask` returned, descending, without void, all with names."""
        ids, void = label_ids(mask), np.iinfo(mask.dtype).max
        self._check_ids(ids, entry, void)
        return ids[1:] if ids[0] == void else ids

    def read_mask(self, entry: Entry) -> np.ndarray:
        """The pixels of a mask file: [H, W] uint8 or uint16, the largest number being void.

        A data set whose files hold something else than its label ids translates them here.

        Raises:
            UserError: the file is missing, unreadable or no index mask.
        """
        picture = self.open_picture(entry.mask, "mask", entry)
        mask = picture.image
        if mask.mode not in MASK_MODES:
            raise entry.fault(
                f"mask {entry.mask} has the mode {mask.mode}; it must be a palette PNG of 8 bits "
                "or a grey one of 8 or 16 whose pixel value is the label id",
                "mask mode",
            )
        if picture.format in ("JPEG", "MPO"):
            raise entry.fault(
                f"mask {entry.mask} is a JPEG, which invents label ids at every border; make it "
                "anew from its source, as a PNG",
                "mask JPEG",
            )
        pixels = np.asarray(mask)
        if mask.mode == "I":  # of 32 bits, though mostly made of 16
            extremes = int(pixels.min()), int(pixels.max())
            self._check_ids([k for k in extremes if not 0 <= k <= WIDE_VOID], entry, WIDE_VOID)
        return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)

    def _check_ids(self, ids: Sequence[int], entry: Entry, void: int) -> None:
        wrong = {*ids} - self._valid - {void}
        if wrong:
            valid = f"{ranges(self.ids, '..')} and {void} (void)"
            words = f"mask {entry.mask} holds the label id {min(wrong)}; valid are {valid}"
            raise entry.fault(words, "ids")

    def open_picture(
        self, path: Path, what: str, entry: Entry, folder: Path | None = None
    ) -> Picture:
        """A file of an entry, decoded; one that lies outside is not touched.

        Args:
            what: what it is, for messages.
            folder: what it must lie in unless links are followed; default: the root.

        Raises:
            UserError: it is missing or unreadable, or lies elsewhere.
        """
        try:
            leaves, (parent, name) = folder is None and self.leaves(path), os.path.split(path)
            real = _real_folder(parent) + name
            if os.path.islink(real):
                real = os.path.realpath(real)
            inside = real.startswith(_real_folder(os.fspath(folder or self.root)))
        except (OSError, ValueError) as error:  # of an impossible name
            fault = UserError(f"cannot be read: {error}", "damaged")
            raise entry.of_file(fault, what, path) from None
        if leaves or not (self.follow_links or inside):
            raise entry.fault(
                f"{what} {path} is a link to {real}, outside the folder {folder or self.root}; "
                "if that is meant, pass --follow_links",
                "leaves" if leaves else "link",
            )
        try:
            return decode(real)
        except UserError as fault:
            raise entry.of_file(fault, what, path) from None


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """A folder without links, a slash at its end: asked for each file, worth a tenth of a scan."""
    return os.path.join(os.path.realpath(folder), "")


def _check_class_names(names: Sequence[str]) -> None:
    where = "data_loader.args.class_names"
    if not 2 <= len(names) <= WIDE_VOID:
        raise UserError(f"{where} has {len(names)} names; between 2 and {WIDE_VOID} are possible.")
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} must be a list of names, background first.")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{where} has the name '{min(twice)}' more than once.")


def bare_id(name: str) -> str:
    """The id of an image that a published list names by its id or by its line of the list."""
    return Path(name.split()[0]).stem if "/" in name else name


def label_ids(mask: np.ndarray) -> list[int]:
    """The values that occur in a mask, [H, W] uint8 or uint16, descending.

    Of bytes, a pass per value at the speed of memory: a mask has few, and a histogram costs as much
    as thirty.
    """
    if mask.dtype != np.uint8:
        occurs = np.zeros(1 + WIDE_VOID, dtype=bool)
        occurs[mask] = True
        return np.flatnonzero(occurs)[::-1].tolist()
    ids = [int(mask.max())]
    while ids[-1] > 0:
        # Less the last id, what lies below it wraps to the top of a byte, above all else: the
        # maximum is the next id below, or, when there is none, leads back to the first.
        below = (ids[-1] + int((mask - np.uint8(ids[-1])).max())) % 256
        if below == ids[0]:
            break
        ids.append(below)
    return ids


def read_list(path: Path) -> list[str]:
    """The lines of a list file; `UserError` when it is missing or no text."""
    try:
        return lines_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
        raise UserError(f"list file {path} {reason}.") from None
