"""From a raw image and mask to equally sized uint8 tensors; the normalisation runs on the device.

Images are resized bilinearly and masks by nearest neighbour, both with Pillow's resampling, which
torchvision's functions apply to PIL images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BILINEAR, NEAREST = F.InterpolationMode.BILINEAR, F.InterpolationMode.NEAREST


class TrainTransform:
    """Random resized crop and horizontal flip.

    Reference quirk: the scale is of the image area and may exceed 1, so about half of the draws do
    not fit and are drawn again, up to ten times, before the centre is taken.

    The random numbers come from torch's global generator, which the data set seeds per sample.
    """

    scale, ratio, flip = (0.5, 2.0), (3 / 4, 4 / 3), 0.5

    def __init__(self, crop_size: int):
        self.size = [crop_size, crop_size]

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        box = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        image, mask = resized_crop(image, mask, box, self.size)
        if torch.rand(1) < self.flip:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        return image, mask


class EvalTransform:
    """Shorter side to `crop_size`, then the centre crop.

    Reference quirk: the published figures are measured on these crops, not on whole images.
    """

    def __init__(self, crop_size: int):
        self.size = crop_size

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        image = F.resize(image, [self.size], interpolation=BILINEAR)
        mask = F.resize(mask, [self.size], interpolation=NEAREST)
        crop = [self.size, self.size]
        return F.center_crop(image, crop), F.center_crop(mask, crop)


class NoTransform:
    """Whole images at their own size."""

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        return image, mask


def resized_crop(
    image: Image.Image, mask: Image.Image, box: tuple[int, int, int, int], size: list[int]
) -> tuple[Image.Image, Image.Image]:
    """Cut `box` = (top, left, height, width) out of both and resize it to `size`."""
    return (
        F.resized_crop(image, *box, size, interpolation=BILINEAR),
        F.resized_crop(mask, *box, size, interpolation=NEAREST),
    )


def to_tensors(image: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """image [3, H, W] uint8 and labels [H, W] uint8."""
    return F.pil_to_tensor(image), torch.from_numpy(labels)


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
        return tuple(
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
