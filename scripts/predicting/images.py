"""Images of the user's own: found in files and folders, read in any format, batched by size.

Knows no model. A broken image is told and does not stop the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from base.image_files import Listing, decode, list_folder, to_rgb, too_large
from data_loader.transforms import Transform
from models.pixels import size_of
from utils.errors import UserError, out_of_memory
from utils.processes import children

Image.init()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is told
# Of the formats that Pillow knows, EPS starts another program, the others it cannot decode itself.
FORMATS = tuple(sorted(Image.OPEN.keys() - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}))
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


def find(places: Sequence[Path]) -> tuple[list[Found], str]:
    """The files among `places`, and the images below the folders, ordered by name.

    Returns:
        The images; what of the folders is left out, in words.

    Raises:
        UserError: a place does not exist, or there is no image.
    """
    found, left_out = [], Listing([], [], [], [])
    for place in places:
        if place.is_dir():
            images = sorted(_images_below(place, left_out))
            found += [Found(path, path.relative_to(place).with_suffix("")) for path in images]
        elif place.is_file():
            found.append(Found(place, Path(place.stem)))
        else:
            raise UserError(f"there is no image or folder {place}.")
    if not found:
        without = f" (left out: {left_out.left_out})" if left_out.left_out else ""
        raise UserError(
            f"no image below {', '.join(map(str, places))}{without}: no file ends in .jpg, .png or "
            "what else Pillow reads."
        )
    return list(dict.fromkeys(found)), left_out.left_out


def _images_below(folder: Path, left_out: Listing) -> list[Path]:
    """The images of a folder and of those in it; what else lies there is added to `left_out`."""
    try:
        listed = list_folder(folder, ENDINGS)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be listed: {error.strerror}.") from None
    left_out.hidden.extend(listed.hidden)
    left_out.others.extend(listed.others)
    images = [folder / name for name in listed.images]
    for below in (folder / name for name in listed.folders):
        if below.is_symlink():  # which may lead back
            left_out.folders.append(below.name)
        else:
            images += _images_below(below, left_out)
    return images


class Sample(NamedTuple):
    """What became of an image file.

    Attributes:
        number: its place in the list.
        image: [3, H, W] uint8; of a broken one nothing.
        fault: why it is broken, or empty.
    """

    number: int
    image: torch.Tensor
    fault: str = ""


class Images(Dataset):
    """Image files, read and transformed."""

    def __init__(self, paths: Sequence[Path], transform: Transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Sample:
        path, size = self.paths[number], None
        try:
            picture = decode(path, FORMATS)
            size = picture.image.size
            (image,) = self.transform(to_rgb(picture))
        except UserError as fault:
            return Sample(number, torch.empty(0), f"{path} {fault}.")
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Sample(number, torch.empty(0), f"{path} {too_large(size)}.")
        return Sample(number, image)


def batches(
    paths: Sequence[Path],
    transform: Transform,
    *,
    pixels: int,
    workers: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read images and batch those of equal size, nearly in order.

    Args:
        paths: of the images.
        transform: what is made of each.
        pixels: of a batch, at most, unless one image alone has more.
        workers: processes that read ahead; 0: this one reads.
        tell: takes the faults of broken images, in words.

    Yields:
        Places in `paths` and images, [N, 3, H, W] uint8.
    """
    loader = DataLoader(
        Images(paths, transform),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=children.leave_to_parent,
        multiprocessing_context=children.start_method(workers),
    )
    with children.block_signals():
        pictures = iter(loader)
    waiting: dict[tuple[int, int], list[Sample]] = {}
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


def _batch(pictures: list[Sample]) -> tuple[list[int], torch.Tensor]:
    first, *others = (each.image for each in pictures)
    # A single one may be so large that there is no room for its copy.
    images = torch.stack([first, *others]) if others else first[None]
    return [each.number for each in pictures], images
