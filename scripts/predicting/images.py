"""Images of the user's own: found in files and folders, read in any format, batched by size.

Used by `scripts/predict.py`; knows no model. A broken image is told and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from data_loader.transforms import Transform
from models.upsampling import size_of
from utils import interrupt
from utils.misc import UserError

Image.init()
# Of the formats that Pillow knows, EPS starts another program, the others it cannot decode itself.
FORMATS = sorted(Image.OPEN.keys() - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
HELD = 4  # batches of images that wait for others of their size


class Found(NamedTuple):
    """An image file.

    Attributes:
        path: where it lies.
        name: what results are called: its path below the folder that was searched, or its name
            alone, without the ending.
    """

    path: Path
    name: Path


def find(places: Sequence[Path]) -> list[Found]:
    """The files among `places`, and the images below the folders, ordered by name.

    Raises:
        UserError: a place does not exist, or there is no image.
    """
    found = []
    for place in places:
        if place.is_dir():
            below = (path for path in place.rglob("*") if path.suffix.lower() in ENDINGS)
            paths = sorted(path for path in below if path.is_file())
            found += [Found(path, path.relative_to(place).with_suffix("")) for path in paths]
        elif place.is_file():
            found.append(Found(place, Path(place.stem)))
        else:
            raise UserError(f"there is no image or folder {place}.")
    if not found:
        raise UserError(
            f"no image below {', '.join(map(str, places))}: no file ends in .jpg, .png or what "
            "else Pillow reads."
        )
    return list(dict.fromkeys(found))


def read_image(path: Path, upright: bool = True) -> Image.Image:
    """An image as RGB; alpha is left out, as in training, and grey of 16 bits becomes 8.

    Args:
        path: of the file.
        upright: turn it as its EXIF orientation says, which training and evaluation do not.

    Raises:
        Exception: of nearly any kind where the file is damaged.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file) if upright else file.copy()
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    return image.convert("RGB")


class Picture(NamedTuple):
    """What became of an image file.

    Attributes:
        number: its place in the list.
        image: [3, H, W] uint8; of a broken one nothing.
        fault: why it is broken, or empty.
    """

    number: int
    image: torch.Tensor
    fault: str = ""


class Pictures(Dataset):
    """Image files, read and transformed."""

    def __init__(self, paths: Sequence[Path], transform: Transform, upright: bool):
        self.paths, self.transform, self.upright = paths, transform, upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Picture:
        try:
            (image,) = self.transform(read_image(self.paths[number], self.upright))
        except Exception as error:  # on a damaged file Pillow raises nearly anything
            words = " ".join(str(error).split()) or type(error).__name__
            return Picture(number, torch.empty(0), f"{self.paths[number]} cannot be read: {words}")
        return Picture(number, image)


def batches(
    paths: Sequence[Path],
    transform: Transform,
    *,
    upright: bool,
    pixels: int,
    workers: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read images and batch those of equal size, nearly in order.

    Args:
        paths: of the images.
        transform: what is made of each.
        upright: as in `read_image`.
        pixels: of a batch, at most, unless one image alone has more.
        workers: processes that read ahead; 0: this one reads.
        tell: takes the faults of broken images, in words.

    Yields:
        Places in `paths` and images, [N, 3, H, W] uint8.
    """
    loader = DataLoader(
        Pictures(paths, transform, upright),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=interrupt.leave_to_parent,
        multiprocessing_context=interrupt.start_method(workers),
    )
    with interrupt.shield():
        pictures = iter(loader)
    waiting: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        if picture.fault:
            tell(picture.fault)
            continue
        height, width = size = size_of(picture.image)
        waiting.setdefault(size, []).append(picture)
        if (1 + len(waiting[size])) * height * width > pixels:
            yield _batch(waiting.pop(size))
        elif sum(len(group) * h * w for (h, w), group in waiting.items()) > HELD * pixels:
            yield _batch(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    for group in waiting.values():
        yield _batch(group)


def _batch(pictures: list[Picture]) -> tuple[list[int], torch.Tensor]:
    return [each.number for each in pictures], torch.stack([each.image for each in pictures])
