"""What a training step or an evaluation sees of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch


def void_of(labels: torch.Tensor) -> int:
    """The label of void, the largest number of its type."""
    return torch.iinfo(labels.dtype).max


class Batch(NamedTuple):
    """One batch of this rank, on the device.

    Attributes:
        images: [N, 3, H, W] float32, normalised.
        labels: [N, H, W] channels, 0 = background, 255 = void (more bits: `void_of` them).
        iteration: of the step, from 0; the same on all ranks and after a resume.
        saliency: [N, H, W] uint8, 1 where an image's saliency map says so; None without maps.
        replayed: [N] bool, which images come from the replay memory; None: none of them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    iteration: int = 0
    saliency: torch.Tensor | None = None
    replayed: torch.Tensor | None = None
