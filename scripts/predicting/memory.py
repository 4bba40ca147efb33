"""When there is too little memory for an image: what says so, and the one sentence about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.pixels import size_of
from utils.errors import UserError, out_of_memory


class TooLarge(UserError):
    """There is too little memory for an image."""


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
