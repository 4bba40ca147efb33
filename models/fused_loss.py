"""The loss terms in one pass of a GPU: nothing of full resolution is ever written to memory.

It equals `binary_cross_entropy` of `models/loss.py`, as do the chunks of `models/fast_loss.py`,
which are the way wherever this one is not. A Triton kernel upsamples, compares with the target and
sums loss and gradient in registers. Off unless `fast.fused_loss` switches it on.

Between two neighbouring rows and two neighbouring columns of the logits lies a *cell* of pixels,
16×16 of them at output stride 16, which read the same four logits; with the cells at the border,
half as wide, there are (h+1)×(w+1). A program sums up one cell of several classes, and the four
logits around it receive their gradient from four cells, without atomic additions: the same bits
every time.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from models.upsampling import upsample

switched_on = False  # by the trainer, from the config

CLASSES = 8  # of a program at most; it loads the labels of its cell once


def fault(device: torch.device) -> str:
    """Why the kernel cannot run there, empty when it can; tried on a single pixel.

    It needs CUDA and Triton, and Triton a C compiler with Python's headers and a place to cache.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    try:
        total, _ = losses(torch.zeros(1, 1, 1, 1, device=device), (1, 1), 1.0, True)
        return "" if total.isfinite().all() else "it gives no number"
    except Exception as error:  # whatever is missing, there is another way
        return f"{type(error).__name__}: {error}".splitlines()[0]


def serves(logits: torch.Tensor) -> bool:
    """Whether these losses are for the kernel: on a GPU and not in double precision."""
    return switched_on and logits.is_cuda and logits.dtype != torch.float64


def losses(
    logits: torch.Tensor,
    size: tuple[int, int],
    pos_weight: float,
    with_gradient: bool,
    *,
    labels: torch.Tensor | None = None,
    first_channel: int = 0,
    teacher: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Binary cross-entropy of upsampled logits and its gradient.

    Targets are 1 where the label names the class, the scores of the teacher, or else 0.

    Args:
        logits: [N, C, h, w] in any layout.
        size: H and W, to which they are upsampled.
        pos_weight: weight of the positive part.
        with_gradient: whether the gradient is wanted.
        labels: [N, H, W] uint8 channels.
        first_channel: label that belongs to `logits[:, 0]`.
        teacher: [N, C, h, w] logits.

    Returns:
        Sum over N, H and W, [C] float32, and its gradient, [N, C, h, w] float32 or None.
    """
    from models.fused_kernel import TARGETS, binary_cross_entropy

    (N, C, h, w), (H, W) = logits.shape, size
    assert teacher is None or teacher.shape == logits.shape, "a kernel reads what it is told to"
    assert labels is None or labels.shape == (N, H, W)
    row_starts, row_weights, rows = cells(h, H, logits.device)
    column_starts, column_weights, columns = cells(w, W, logits.device)
    total = logits.new_empty((C, N, (h + 1) * (w + 1)), dtype=torch.float32)
    corners = total.new_empty((4 if with_gradient else 0, N, C, h + 1, w + 1))
    kind = "labels" if labels is not None else "teacher" if teacher is not None else "zero"
    teacher = logits if teacher is None else teacher  # any pointer will do
    labels = logits if labels is None else labels.contiguous()
    blocks = math.ceil(C / CLASSES)
    launch = binary_cross_entropy[(h + 1) * (w + 1), N, blocks]
    with torch.cuda.device_of(logits):
        launch(
            *(logits, *logits.stride(), teacher, *teacher.stride(), labels),
            *(row_starts, row_weights, column_starts, column_weights, total, corners),
            *(C, h, w, H, W, first_channel, float(pos_weight)),
            TARGET=TARGETS[kind],
            GRADIENT=with_gradient,
            CLASSES=math.ceil(C / blocks),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=max(1, min(8, rows * columns // 256)),
            enable_fp_fusion=True,
        )
    if not with_gradient:
        return total.sum((1, 2)), None
    # A logit lies at the far corners of the cell before it and at the near ones of the next.
    near, far = corners.view(2, 2, *corners.shape[1:])  # each [2, N, C, h + 1, w + 1]
    left, right = near[..., 1:, :] + far[..., :-1, :]  # each [N, C, h, w + 1]
    return total.sum((1, 2)), left[..., 1:] + right[..., :-1]


@lru_cache(maxsize=32)
def cells(before: int, after: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """How `after` pixels in a row lie between `before` logits.

    Returns:
        start [before + 2] int32: first pixel of every cell, and `after`. weight [after] float32 of
        the far one of a pixel's two logits; at the border, where both are the same, 1 in the first
        cell and 0 in the last. And the smallest power of two that no cell has more pixels than.
    """
    pixels = torch.arange(after)
    # Pixel d has its centre at (d + ½) before / after - ½, in units and from the first of the
    # logits; the cell is the next whole number above.
    cell = ((2 * pixels + 1) * before - after).div(2 * after, rounding_mode="floor") + 1
    counts = torch.bincount(cell, minlength=before + 1)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    identity = torch.eye(before)[None, None]
    rows = upsample(identity, (after, before))[0, 0]  # what `upsample` multiplies by
    weight = rows.gather(1, cell.clamp(max=before - 1)[:, None])[:, 0]
    weight[cell == 0], weight[cell == before] = 1, 0
    widest = 1 << int(counts.max() - 1).bit_length()
    return start.to(device, torch.int32), weight.to(device), widest
