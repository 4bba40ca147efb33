"""The files of a list's entries: where they may lie, and what their pixels must be.

It knows neither how a data set lists its images nor what its classes mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from base.image_files import Picture, decode, to_rgb
from utils.errors import UserError
from utils.labels import VOID, WIDE_VOID, ranges

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

    def fault(self, text: str, kind: str) -> UserError:
        """What is wrong with it, with its place in the list."""
        return UserError(f"{self.where}: {text}.", kind)

    def of_file(self, fault: UserError, what: str, path: Path) -> UserError:
        """What is wrong with a file, as `base/image_files.py` has it, with its name."""
        return self.fault(f"{what} {path} {fault}", f"{what} {fault.kind}")


class EntryFiles:
    """Reads the images and masks of entries and refuses what is no faithful input.

    Attributes:
        root: the folder that all files must lie in.
        follow_links: accept files that symbolic links put outside the root.
        entries: the images of a split, in list order.
        ids: the label ids that a mask may hold, ascending.
        void: label id of void in the masks that are handed out.
    """

    root: Path
    follow_links: bool
    entries: list[Entry]
    ids: tuple[int, ...]
    void: int

    def __len__(self) -> int:
        return len(self.entries)

    def leads_outside(self, path: Path) -> bool:
        """Whether a path leads out of the root by its own parts."""
        if ".." not in path.parts:
            return False
        return not os.path.abspath(path).startswith(os.path.join(os.path.abspath(self.root), ""))

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
        text = (
            f"image {entry.image} is {image[0]}×{image[1]} pixels, but its mask {entry.mask} "
            f"is {mask[1]}×{mask[0]}"
        )
        if image == mask:
            for what, path in (("image", entry.image), ("mask", entry.mask)):
                picture = self.open_picture(path, what, entry)
                if picture.swapped:
                    text += (
                        f"; the {what} has the EXIF orientation {picture.orientation}, which is "
                        "applied, and without which both would fit: where the mask was drawn on "
                        f"the pixels as they are stored, delete that tag from the {what}, else "
                        "make the mask anew"
                    )
        raise entry.fault(text, "sizes")

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

    @cached_property
    def _valid(self) -> frozenset[int]:
        return frozenset(self.ids)

    def _check_ids(self, ids: Sequence[int], entry: Entry, void: int) -> None:
        wrong = {*ids} - self._valid - {void}
        if wrong:
            valid = f"{ranges(self.ids, '..')} and {void} (void)"
            text = f"mask {entry.mask} holds the label id {min(wrong)}; valid are {valid}"
            raise entry.fault(text, "ids")

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
            outside = folder is None and self.leads_outside(path)
            parent, name = os.path.split(path)
            real = _real_folder(parent) + name
            if os.path.islink(real):
                real = os.path.realpath(real)
            inside = real.startswith(_real_folder(os.fspath(folder or self.root)))
        except (OSError, ValueError) as error:  # of an impossible name
            fault = UserError(f"cannot be read: {error}", "damaged")
            raise entry.of_file(fault, what, path) from None
        if outside or not (self.follow_links or inside):
            raise entry.fault(
                f"{what} {path} is a link to {real}, outside the folder {folder or self.root}; "
                "if that is meant, pass --follow_links",
                "leaves" if outside else "link",
            )
        try:
            return decode(real)
        except UserError as fault:
            raise entry.of_file(fault, what, path) from None


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """A folder without links, a slash at its end: asked for each file, worth a tenth of a scan."""
    return os.path.join(os.path.realpath(folder), "")


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
