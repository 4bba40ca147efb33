"""Saliency maps: a folder of PNGs, one for each training image, made by somebody's detector.

Methods ask for them (SSUL). It knows neither steps nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from base.base_dataset import BaseDataset, Entry
from base.image_files import list_folder
from utils.errors import UserError, listing

KEY = "data_loader.args.saliency_dir (--saliency_dir)"
MODES = ("1", "L", "P")  # Pillow's names of 1 bit, grey and palette of 8 bits
WHAT = "saliency map"


class SaliencyMaps:
    """The maps of a folder: `{folder}/{bare image id}.png`; a value above 0 is salient."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def file(self, entry: Entry) -> Path:
        """Where the map of an image lies."""
        return self.folder / f"{entry.id}.png"

    def check(self, entries: Sequence[Entry] = ()) -> None:
        """Whether the folder exists and has a file for every image; none is opened.

        Raises:
            UserError: it has not.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"{KEY}: the folder {self.folder} does not exist; name one that holds a map ID.png "
                "for every training image.",
                "saliency folder",
            )
        without = [entry for entry in entries if not self.file(entry).is_file()]
        if without:
            first, images = without[0], list_folder(self.folder).images
            others = [name for name in images if Path(name).stem == first.id]
            instead = f", only {listing(others)}, which is not looked for" if others else ""
            raise UserError(
                f"{KEY}: {len(without)} of {len(entries)} training images have no saliency map, "
                f"the first of them is {first.id}: {self.file(first)} does not exist{instead}; "
                "make those with the same detector, or name a complete folder."
            )

    def read(self, source: BaseDataset, entry: Entry, size: tuple[int, int] | None) -> np.ndarray:
        """The map of an image: [H, W] uint8, 1 = salient.

        Args:
            source: the data set of the image; says whether links out of the folder are followed.
            size: its width and height; None: they are not compared.

        Raises:
            UserError: the file is missing, unreadable, no grey picture or of another size.
        """
        path = self.file(entry)
        picture = source.open_picture(path, WHAT, entry, self.folder)
        image = picture.image
        if image.mode not in MODES or picture.format in ("JPEG", "MPO"):
            raise entry.fault(
                f"{WHAT} {path} is a {picture.format} of the mode {image.mode}; it must be a PNG "
                "of 1 bit, grey of 8, or with a palette, 0 where nothing is salient",
                f"{WHAT} mode",
            )
        if size is not None and image.size != size:
            raise entry.fault(
                f"image {entry.image} is {size[0]}×{size[1]} pixels, but its {WHAT} {path} is "
                f"{image.width}×{image.height}",
                f"{WHAT} size",
            )
        return (np.asarray(image) > 0).view(np.uint8)
