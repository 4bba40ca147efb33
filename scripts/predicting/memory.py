"""When there is too little memory for an image: what says so, and the one sentence about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.upsampling import size_of
from utils.misc import UserError

# What the allocators of CPU, CUDA and their libraries say, in exceptions of many kinds.
REFUSALS = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")


class TooLarge(UserError):
    """There is too little memory for an image."""


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there is too little memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in REFUSALS)


@contextmanager
def enough_memory(images: torch.Tensor) -> Iterator[None]:
    """Turn an exception for want of memory into `TooLarge`.

    Args:
        images: [N, 3, H, W], what is computed on.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TooLarge) or not out_of_memory(error):
            raise
        height, width = size_of(images)
        raise TooLarge(
            f"there is too little memory for {len(images)} image(s) of {width}×{height} pixels."
        ) from None
