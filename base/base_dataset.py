"""What a data set is: a list of images with masks, and class names. It knows nothing of steps.

How their files are read and judged stands in `base/entry_files.py`.
"""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from base.entry_files import Entry, EntryFiles
from base.image_files import Listing, list_folder
from base.task import ClassNames, ids_of
from utils.errors import UserError, listing
from utils.labels import BACKGROUND, WIDE_VOID, void_id
from utils.text import lines_of, path_of

NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: control characters, halves, line ends


class BaseDataset(EntryFiles, ABC):
    """The images and masks of one split ("train" or "val") of a data set on disk.

    A subclass is all there is to say about a data set: the class attributes, the two methods
    `read_class_names` and `read_entries`, and a line in `data_loader/__init__.py`.

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
            data_dir: the root; default: the environment variable, then `default_root`.
            class_names: names of the label ids 0, 1, 2 …; default: the data set's own.
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
            content = self.listings[folder] = list_folder(folder)
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
            raise UserError(f"the image folder {folder} {reason}.") from None
        return [folder / name for name in content.images]

    @property
    def left_out(self) -> str:
        """What of the folders that were listed is no image, as text; mostly empty."""
        left_out = ((folder, content.left_out) for folder, content in self.listings.items())
        return listing(f"{folder}: {text}" for folder, text in left_out if text)

    def _check_entries(self) -> None:
        if not self.entries and not self.faults:
            what = f"{self.root}: the {self.split} list of the data set is empty"
            without = f" without what is left out of {self.left_out}" if self.left_out else ""
            self.tell(UserError(f"{what}{without}.", "empty"))
        first: dict[str, Entry] = {}
        for entry in self.entries:
            for path in filter(self.leads_outside, (entry.image, entry.mask)):
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


def read_list(path: Path) -> list[str]:
    """The lines of a list file; `UserError` when it is missing or no text."""
    try:
        return lines_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
        raise UserError(f"list file {path} {reason}.") from None
