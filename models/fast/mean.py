"""The mean over all pixels of a loss of upsampled logits, whose gradient is formed on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from models.pixels import exact_products, full_precision


def pixel_mean(
    sums: Callable[..., torch.Tensor], logits: torch.Tensor, size: tuple[int, int], *what: Any
) -> torch.Tensor:
    """Mean over all pixels of a loss of upsampled logits.

    Args:
        sums: takes logits in full precision, room for their gradient or None, size and `what`;
            fills the room and returns the sum over N, H and W, [C] or [1].
        logits: [N, C, h, w].
        size: H and W, to which they are upsampled.
        what: the rest, without gradient.

    Returns:
        [C] or [1].
    """
    if not torch.is_grad_enabled():
        logits = logits.detach()
    with torch.autocast(logits.device.type, enabled=False):
        return PixelMean.apply(logits, sums, tuple(size), what)


class PixelMean(torch.autograd.Function):
    """The forward pass forms the gradient as well, so nothing of full resolution is kept."""

    @staticmethod
    @exact_products()
    def forward(ctx, logits, sums, size, what):
        """[N, C, h, w] → [C] or [1]."""
        inputs = full_precision(logits)
        gradient = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        total = sums(inputs, gradient, size, *what)
        ctx.dtype, ctx.count = logits.dtype, len(logits) * math.prod(size)
        ctx.save_for_backward(gradient)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        """[C] or [1] → [N, C, h, w]. Half precision only now: a loss scale has lifted it."""
        (gradient,) = ctx.saved_tensors
        gradient = gradient * (weight / ctx.count)[:, None, None]
        return gradient.to(ctx.dtype), None, None, None
