"""What a raw data set offers: images, index masks, class names. It knows nothing of steps.

Subclassed once per data set in `data_loader/`; used by `IncrementalDataset` and the presence scan.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from utils.misc import VOID, UserError

# Pillow knows more, some of which start other programs or fail in ways of their own.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")


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


class BaseDataset(ABC):
    """The images and masks of one split ("train" or "val") of a data set on disk.

    A subclass sets the class attributes and implements `read_entries` and `read_class_names`.

    Attributes:
        name: short name, a part of file names ("voc").
        default_root: where the data lie when nobody says otherwise.
        root_variable: environment variable that may say otherwise.
    """

    name: str
    default_root: str
    root_variable: str

    def __init__(
        self,
        split: str,
        data_dir: str | None = None,
        class_names: Sequence[str] | None = None,
        follow_links: bool = False,
    ):
        """Read the list of a split; no image is opened.

        Args:
            split: "train" or "val".
            data_dir: the root; default: the environment variable, then `default_root`.
            class_names: names of the classes, background first; default: the data set's own.
            follow_links: accept files that symbolic links put outside the root.

        Raises:
            UserError: the root or a list is missing, a list is empty, names an image twice, or
                names a path outside the root.
        """
        self.split, self.follow_links = split, follow_links
        self.root = self.find_root(data_dir)
        if not self.root.is_dir():
            raise UserError(
                f"the data set's folder {self.root} does not exist; name it with --data_dir, "
                f"data_loader.args.data_dir or the environment variable {self.root_variable}."
            )
        self.class_names = tuple(class_names) if class_names else self.read_class_names()
        self.entries = self.read_entries()
        self._check_entries()

    @classmethod
    def find_root(cls, data_dir: str | None = None) -> Path:
        """The root: `data_dir`, then the environment variable, then the default."""
        return Path(data_dir or os.environ.get(cls.root_variable) or cls.default_root)

    @abstractmethod
    def read_class_names(self) -> tuple[str, ...]:
        """Class names, background first."""

    @abstractmethod
    def read_entries(self) -> list[Entry]:
        """The images of the split, in list order."""

    def _check_entries(self) -> None:
        if not self.entries:
            raise UserError(f"{self.root}: the {self.split} list of the data set is empty.")
        first: dict[str, Entry] = {}
        inside = os.path.join(os.path.abspath(self.root), "")
        for entry in self.entries:
            for path in (entry.image, entry.mask):
                if ".." in path.parts and not os.path.abspath(path).startswith(inside):
                    raise UserError(
                        f"{entry.where}: the path {path} leaves the data set's folder {self.root}; "
                        "every file must lie inside it."
                    )
            if entry.id in first:
                raise UserError(
                    f"{entry.where}: image {entry.id} stands in the list twice, "
                    f"first at {first[entry.id].where}."
                )
            first[entry.id] = entry

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Read one image and its mask.

        Returns:
            The RGB image and the mask, [H, W] uint8 label ids, 255 = void.

        Raises:
            UserError: a file is missing or unreadable, the sizes differ or an id is out of range.
        """
        entry = self.entries[index]
        image = self._open(entry.image, "image", entry)
        if image.mode != "RGB":  # else `convert` would copy it
            image = image.convert("RGB")
        mask = self.load_mask(index)
        if image.size != mask.shape[::-1]:
            raise UserError(
                f"{entry.where}: image {entry.image} is {image.width}×{image.height} pixels, "
                f"but its mask {entry.mask} is {mask.shape[1]}×{mask.shape[0]}."
            )
        return image, mask

    def load_mask(self, index: int) -> np.ndarray:
        """Read one mask: [H, W] uint8 label ids, 255 = void.

        Raises:
            UserError: as `load`.
        """
        entry = self.entries[index]
        mask = self._read_mask(entry)
        # One more than an id, void becoming 0 as bytes wrap: no valid one exceeds the number of
        # classes. Two passes, for every sample is checked; the ids themselves take more.
        if (mask + np.uint8(1)).max() > len(self.class_names):
            self.check_ids(label_ids(mask), entry)
        return mask

    def load_ids(self, index: int) -> list[int]:
        """The label ids in one mask, descending, for the presence scan.

        Raises:
            UserError: as `load_mask`.
        """
        entry = self.entries[index]
        ids = label_ids(self._read_mask(entry))
        self.check_ids(ids, entry)
        return ids

    def _read_mask(self, entry: Entry) -> np.ndarray:
        mask = self._open(entry.mask, "mask", entry)
        if mask.mode not in ("P", "L"):
            raise UserError(
                f"{entry.where}: mask {entry.mask} has the mode {mask.mode}; it must be an 8-bit "
                "palette or grey PNG whose index is the class."
            )
        return np.asarray(mask)

    def _open(self, path: Path, what: str, entry: Entry) -> Image.Image:
        file, root = os.fspath(path), _real_folder(os.fspath(self.root))
        try:
            # The folder first: what lies outside is not even asked whether it exists.
            inside = self.follow_links or _real_folder(os.path.dirname(file)).startswith(root)
            mode = os.lstat(file).st_mode if inside else 0
            if stat.S_ISLNK(mode):
                inside = self.follow_links or os.path.realpath(file).startswith(root)
                mode = os.stat(file).st_mode if inside else 0
            if not inside:
                raise UserError(
                    f"{entry.where}: {what} {path} is a link to {os.path.realpath(path)}, outside "
                    f"the data set's folder {self.root}; if that is meant, pass --follow_links."
                )
            if not stat.S_ISREG(mode):
                raise OSError("it is no regular file")  # a pipe would block for ever
            image = Image.open(file, formats=IMAGE_FORMATS)
            image.load()
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{entry.where}: {what} {path} does not exist.") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow tells a broken file by any of these, and an absurd size by the last.
            raise UserError(f"{entry.where}: {what} {path} cannot be read: {error}.") from None
        return image

    def check_ids(self, ids: Sequence[int], entry: Entry) -> None:
        """Raise `UserError` when `ids`, the label ids of a mask, leave 0…classes and 255."""
        classes = len(self.class_names)
        wrong = [id for id in ids if id >= classes and id != VOID]
        if wrong:
            raise UserError(
                f"{entry.where}: mask {entry.mask} holds the label id {min(wrong)}; valid are "
                f"0..{classes - 1} and {VOID} (void)."
            )


def bare_id(name: str) -> str:
    """The id of an image that a published list names by its id or by its line of the list."""
    return Path(name.split()[0]).stem if "/" in name else name


def label_ids(mask: np.ndarray) -> list[int]:
    """The values that occur in a mask of bytes, descending.

    A pass per value at the speed of memory. A mask has few; a histogram costs as much as thirty.
    """
    ids = [int(mask.max())]
    while ids[-1] > 0:
        # Less the last id, what lies below it wraps to the top of a byte, above all else: the
        # maximum is the next id below, or, when there is none, leads back to the first.
        below = (ids[-1] + int((mask - np.uint8(ids[-1])).max())) % 256
        if below == ids[0]:
            break
        ids.append(below)
    return ids


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """The folder without symbolic links and with a slash at its end."""
    return os.path.join(os.path.realpath(folder), "")


def read_list(path: Path) -> list[str]:
    """The lines of a list file.

    Raises:
        UserError: the file is missing or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
        raise UserError(f"list file {path} {reason}.") from None
