"""Image files: which files of a folder are images, and what a network sees of one.

The only reader of training, evaluation, prediction and the data doctor, so that a file has the same
pixels everywhere. It knows no data set and no label ids.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from utils.errors import UserError, listing

# Pillow knows more, some of which start other programs or fail in ways of their own.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif"),
        *(".tiff", ".webp"),
    }
)
# Besides names that begin with a dot: what file systems, viewers and archives leave beside images.
HIDDEN = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle"),
        *("$recycle.bin", "system volume information", "lost+found"),
    }
)
LARGEST_FILE = 2**30  # bytes; no image of a data set comes near

# Pillow's modes that it converts to RGB as meant; alpha is left out.
EIGHT_BITS = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B")
GREY_AS_I = ("PNG", "PPM")  # formats whose grey of 16 bits some versions of Pillow have in 32
DARK = 4096  # of 65,536: a picture of 16 bits whose values are all below is of a sensor of 12 bits

ORIENTATION = 0x0112  # the tag of EXIF and TIFF
_TURNS = Image.Transpose
TURNS = {
    2: _TURNS.FLIP_LEFT_RIGHT,
    3: _TURNS.ROTATE_180,
    4: _TURNS.FLIP_TOP_BOTTOM,
    5: _TURNS.TRANSPOSE,
    6: _TURNS.ROTATE_270,
    7: _TURNS.TRANSVERSE,
    8: _TURNS.ROTATE_90,
}


class Picture(NamedTuple):
    """A decoded image file, of several frames the first.

    Attributes:
        image: as viewers show it, upright, in any of Pillow's modes.
        format: Pillow's name of it.
        orientation: 1 to 8, how it was turned from what the file stores, in EXIF's numbers.
        deep: whether the file has 16 bits per channel.
    """

    image: Image.Image
    format: str
    orientation: int = 1
    deep: bool = False

    @property
    def swapped(self) -> bool:
        """Whether the file stores width as height."""
        return self.orientation > 4

    @property
    def peak(self) -> int:
        """The largest value of any channel but alpha, of 65,535; of a colour within 256 of it."""
        if self.image.mode in SIXTEEN_BITS or self.image.mode == "I":
            return int(np.asarray(self.image).max())
        bands = zip(self.image.getbands(), self.image.split(), strict=True)
        return 257 * max(int(np.asarray(band).max()) for name, band in bands if name != "A")


def decode(path: str | os.PathLike[str], formats: tuple[str, ...] = FORMATS) -> Picture:
    """Read an image file and turn it upright.

    Args:
        path: of the file.
        formats: Pillow's names of those that it may have, whatever its ending.

    Raises:
        UserError: what is wrong with the file, to follow its name; of the kind "missing",
            "damaged" or "too large".
    """
    size = None
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")  # a pipe would block for ever
        if status.st_size > LARGEST_FILE:
            raise OSError(f"it has {status.st_size:,} bytes")
        file = Image.open(path, formats=formats)
        size, kind, deep, orientation = file.size, file.format or "", False, 1
        if kind in ("PNG", "TIFF"):  # whose tiles tell in what form the decoder takes the pixels
            deep = any(";16" in str(tile[3]) for tile in file.tile[:1])
        if isinstance(file, TiffImageFile):
            tag = file.tag_v2.get(ORIENTATION)
            file.load()  # which turns it
            return Picture(file, kind, tag if tag in TURNS else 1, deep)
        file.load()
        if exif := file.info.get("exif"):
            orientation = exif_orientation(exif)
        image = file if orientation == 1 else file.transpose(TURNS[orientation])
        return Picture(image, kind, orientation, deep)
    except FileNotFoundError:
        raise UserError("does not exist", "missing") from None
    except Image.DecompressionBombError as error:
        text = f"cannot be read: {error}; scale it down or cut it into parts"
        raise UserError(text, "too large") from None
    except MemoryError:
        raise too_large(size) from None
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read: {text}", "damaged") from None


def too_large(size: tuple[int, int] | None, advice: str = "") -> UserError:
    """The fault of an image of this width and height that does not fit into memory."""
    pixels = f" of {size[0]}×{size[1]} pixels" if size else ""
    advice = f"{advice}scale it down or cut it into parts"
    return UserError(f"{pixels} is too large for the memory; {advice}".lstrip(), "too large")


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF data; 1 where they have none or are broken.

    Pillow's own reading warns and raises on broken data, and takes ten times as long.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ORIENTATION:
                form = {1: "B", 3: "H", 4: "I"}[kind]  # mostly the second
                (value,) = struct.unpack_from(order + form, exif, place + 8)
                return value if value in TURNS else 1
    except (struct.error, KeyError):
        pass
    return 1


def to_rgb(picture: Picture) -> Image.Image:
    """A picture as a network sees it: RGB of 8 bits.

    Grey of 16 bits is scaled from 0..65,535 to 0..255 and rounded; of colours of 16 bits Pillow
    keeps the upper 8. Alpha is left out; palettes, grey, CMYK and YCbCr become what Pillow makes of
    them; colour profiles are not applied.

    Raises:
        UserError: there is no faithful way, to follow the name of the file; of the kind "depth" or
            "mode".
    """
    image, mode = picture.image, picture.image.mode
    if mode == "RGB" and not picture.deep:
        return image
    wide = mode in SIXTEEN_BITS or (mode == "I" and picture.format in GREY_AS_I)
    advice = "scale it to 8 bits over the range of the sensor, all images of a data set alike"
    if mode in ("I", "F") and not wide:
        text = f"holds {'floats' if mode == 'F' else 'integers'} that do not say what is white"
        raise UserError(f"{text} (Pillow's mode {mode}); {advice}", "depth")
    if not wide and mode not in EIGHT_BITS:
        text = f"has the mode {mode}, of which there is no faithful RGB"
        raise UserError(f"{text}; save it as RGB of 8 bits", "mode")
    # Black is black at any scale, if only it is known: of colours the lower 8 bits are not.
    if (wide or picture.deep) and (peak := picture.peak) < DARK and not (wide and peak == 0):
        bits = max(8, peak.bit_length())
        text = f"has 16 bits, but uses at most {bits} of them and would be nearly black"
        raise UserError(f"{text}; {advice}", "depth")
    if wide:
        # Rounded: 65,535 is 255 × 257.
        image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # on which Pillow would warn that it is left out
    return image.convert("RGB")


class Listing(NamedTuple):
    """What lies in a folder: names, sorted.

    Attributes:
        images: files that are images by their ending.
        hidden: hidden files and folders, and those that other systems leave.
        others: files of other endings.
        folders: folders in it.
    """

    images: list[str]
    hidden: list[str]
    others: list[str]
    folders: list[str]

    @property
    def left_out(self) -> str:
        """How many are no images, and why; empty where all are."""
        endings = sorted({Path(name).suffix.lower() or "none" for name in self.others})
        counts = {
            "hidden": self.hidden,
            f"with an ending of no image ({listing(endings, most=5)})": self.others,
            "in the form of folders": self.folders,
        }
        return listing(f"{len(names)} {why}" for why, names in counts.items() if names)


def list_folder(folder: str | os.PathLike[str], endings: Collection[str] = ENDINGS) -> Listing:
    """Sort what lies in a folder; no file is opened, and links are followed.

    Raises:
        OSError: it cannot be listed.
    """
    listed = Listing([], [], [], [])
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in HIDDEN:
                listed.hidden.append(entry.name)
            elif entry.is_dir():
                listed.folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in endings:
                listed.images.append(entry.name)
            else:
                listed.others.append(entry.name)
    for names in listed:
        names.sort()
    return listed
