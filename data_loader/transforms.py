"""From an image and its labels to equally sized tensors of integers; the device normalises them.

Images are resized bilinearly, labels and other maps by nearest neighbour, with Pillow's resampling:
the same numbers as torchvision's functions on PIL images, which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# image, labels and perhaps more maps of the same pixels → a tensor of each
Transform = Callable[..., tuple[torch.Tensor, ...]]
LABEL_TYPES = {"L": torch.uint8, "P": torch.uint8, "I": torch.int32}  # by Pillow's mode
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


class TrainTransform:
    """Random resized crop and horizontal flip.

    Reference quirk: the scale is of the image area and may exceed 1, so about half of the draws do
    not fit and are drawn again, up to ten times, before the centre is taken.

    The random numbers come from torch's global generator, which the data set seeds per sample.
    """

    scale, ratio, flip = (0.5, 2.0), (3 / 4, 4 / 3), 0.5

    def __init__(self, crop_size: int):
        self.size = (crop_size, crop_size)

    def __call__(self, image: Image.Image, *maps: Image.Image) -> tuple[torch.Tensor, ...]:
        box = random_box(*image.size, self.scale, self.ratio)
        tensors = to_tensors(*resized_crop(box, self.size, image, *maps))
        if torch.rand(1).item() < self.flip:
            return tuple([part.flip(-1) for part in tensors])  # a fifth of Pillow's time
        return tensors


class EvalTransform:
    """Shorter side to `crop_size`, then the centre crop.

    Reference quirk: the published figures are measured on these crops, not on whole images.
    """

    def __init__(self, crop_size: int):
        self.size = crop_size

    def __call__(self, image: Image.Image, *maps: Image.Image) -> tuple[torch.Tensor, ...]:
        shorter = min(image.size)
        width, height = (side * self.size // shorter for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        corners = (left, top, left + self.size, top + self.size)
        crops = [part.resize((width, height), NEAREST).crop(corners) for part in maps]
        return to_tensors(image.resize((width, height), BILINEAR).crop(corners), *crops)


class Resize:
    """The whole image at one size, (height, width), whatever its shape."""

    def __init__(self, size: tuple[int, int]):
        height, width = size
        self.size = (width, height)

    def __call__(self, image: Image.Image, *maps: Image.Image) -> tuple[torch.Tensor, ...]:
        resized = [part.resize(self.size, NEAREST) for part in maps]
        return to_tensors(image.resize(self.size, BILINEAR), *resized)


class NoTransform:
    """Whole images at their own size."""

    def __call__(self, image: Image.Image, *maps: Image.Image) -> tuple[torch.Tensor, ...]:
        return to_tensors(image, *maps)


def eval_transform(way: str | tuple[int, int], crop_size: int) -> Transform:
    """How a data set is evaluated (`BaseDataset.evaluation`)."""
    if isinstance(way, tuple):
        return Resize(way)
    ways: dict[str, Transform] = {"crop": EvalTransform(crop_size), "whole": NoTransform()}
    return ways[way]


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random part of an image, as (top, left, height, width).

    The draws and the arithmetic of torchvision's `RandomResizedCrop.get_params`, whose numbers it
    returns, without what that repeats per draw.

    Args:
        width, height: of the image.
        scale: share of its area, from and to.
        ratio: width over height, from and to.
    """
    number = torch.empty(1)
    low, high = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = width * height * number.uniform_(*scale).item()
        aspect = number.uniform_(low, high).exp_().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            return top, left, h, w
    # the centre, as wide or as high as the aspect ratio allows
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    image: Image.Image,
    *maps: Image.Image,
) -> list[Image.Image]:
    """Cut `box` = (top, left, height, width) out of an image and its maps, resized to `size`."""
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    # Not resize(…, box=corners), which blends in pixels around the box and rounds otherwise.
    crops = [part.crop(corners).resize(size, NEAREST) for part in maps]
    return [image.crop(corners).resize(size, BILINEAR), *crops]


def to_tensors(image: Image.Image, *maps: Image.Image) -> tuple[torch.Tensor, ...]:
    """image [3, H, W] uint8 and maps [H, W] uint8, or int32 where Pillow has them so.

    Pillow writes the planes one after the other, as collation wants them: faster than a copy of
    the pixels that is transposed later. A tensor may not share the memory of read-only `bytes`.
    """
    planes = bytearray().join([image.tobytes("raw", band) for band in "RGB"])
    tensors = [torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)]
    for part in maps:
        pixels = torch.frombuffer(bytearray(part.tobytes()), dtype=LABEL_TYPES[part.mode])
        tensors.append(pixels.view(part.height, part.width))
    return tuple(tensors)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the network wants them, computed where the images lie.

    Args:
        images: [N, 3, H, W] uint8.

    Returns:
        [N, 3, H, W] float32, ImageNet mean 0 and standard deviation 1, with the operations in the
        order of torchvision's ToTensor and Normalize, so that the bits agree.
    """
    mean, std = _imagenet_statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@lru_cache
def _imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, [1, 3, 1, 1], copied to a device once: each copy would wait for it."""
    with torch.inference_mode(False):
        mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device).view(2, 1, 3, 1, 1)
        return mean, std
