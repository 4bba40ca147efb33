"""The Triton kernel of `models/fused_loss.py`, in a file of its own: importing it needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

TARGETS = {"zero": 0, "labels": 1, "teacher": 2}


@triton.jit
def _upsampled(logits, row_stride, column_stride, top, bottom, left, right, v, u):
    """A cell of one class, [ROWS, COLUMNS]; v and u weigh the far row and the far column."""
    a = tl.load(logits + top * row_stride + left * column_stride).to(tl.float32)
    b = tl.load(logits + top * row_stride + right * column_stride).to(tl.float32)
    c = tl.load(logits + bottom * row_stride + left * column_stride).to(tl.float32)
    d = tl.load(logits + bottom * row_stride + right * column_stride).to(tl.float32)
    return (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)


@triton.jit
def _sigmoids(x, e):
    """Those of x and of -x, from e = exp(-|x|)."""
    large, small = 1 / (1 + e), e / (1 + e)
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def binary_cross_entropy(
    logits,
    logits_n,
    logits_c,
    logits_h,
    logits_w,
    teacher,
    teacher_n,
    teacher_c,
    teacher_h,
    teacher_w,
    labels,
    row_starts,
    row_weights,
    column_starts,
    column_weights,
    total,
    corners,
    C,
    h,
    w,
    H,
    W,
    first_channel,
    pos_weight,
    TARGET: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss, and gradient of its four logits, of one cell of an image and CLASSES classes.

    Grid: cells, N, blocks of classes. Writes `total` [C, N, cells] and `corners` [4, N, C, cells]:
    near row and near column, near and far, far and near, far and far.
    """
    cell = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    images = tl.num_programs(1)
    cells = (h + 1) * (w + 1)
    down = cell // (w + 1)
    across = cell % (w + 1)
    top = tl.maximum(down - 1, 0)
    bottom = tl.minimum(down, h - 1)
    left = tl.maximum(across - 1, 0)
    right = tl.minimum(across, w - 1)

    rows = tl.load(row_starts + down) + tl.arange(0, ROWS)
    columns = tl.load(column_starts + across) + tl.arange(0, COLUMNS)
    in_rows = rows < tl.load(row_starts + down + 1)
    in_columns = columns < tl.load(column_starts + across + 1)
    v = tl.load(row_weights + rows, mask=in_rows, other=0.0)[:, None]
    u = tl.load(column_weights + columns, mask=in_columns, other=0.0)[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    if TARGET == 1:
        pixels = labels + image * H * W + rows[:, None] * W + columns[None, :]
        label = tl.load(pixels, mask=inside, other=255).to(tl.int32)

    first = tl.program_id(2) * CLASSES
    for number in range(CLASSES):
        channel = tl.minimum(first + number, C - 1)  # the last block may do the last one again
        plane = logits + image * logits_n + channel * logits_c
        x = _upsampled(plane, logits_h, logits_w, top, bottom, left, right, v, u)
        if TARGET == 1:
            y = (label == first_channel + channel).to(tl.float32)
            not_y = 1 - y
        elif TARGET == 2:
            plane_y = teacher + image * teacher_n + channel * teacher_c
            t = _upsampled(plane_y, teacher_h, teacher_w, top, bottom, left, right, v, u)
            y, not_y = _sigmoids(t, tl.exp(-tl.abs(t)))
        else:
            y = tl.zeros([ROWS, COLUMNS], tl.float32)
            not_y = y + 1

        # softplus(x) = max(x, 0) + log(1 + e). And log(1 + e) = 2 artanh(e / (2 + e)), whose series
        # has converged to the last bit here: 1 + e itself would lose the digits of a small e.
        e = tl.exp(-tl.abs(x))
        s = e / (2 + e)
        z = s * s
        series = 1 / 11 + z * (1 / 13)
        series = 1 / 5 + z * (1 / 7 + z * (1 / 9 + z * series))
        log = 2 * s * (1 + z * (1 / 3 + z * series))
        # Written so that large values never cancel.
        loss = (not_y + pos_weight * y) * log
        loss += tl.where(x >= 0, x * not_y, -pos_weight * x * y)
        loss = tl.where(inside, loss, 0)
        tl.store(total + (channel * images + image) * cells + cell, tl.sum(loss))
        if GRADIENT:
            p, not_p = _sigmoids(x, e)
            slope = tl.where(inside, p * not_y - pos_weight * not_p * y, 0)
            out = corners + (image * C + channel) * cells + cell
            step = images.to(tl.int64) * C * cells
            tl.store(out, tl.sum((1 - v) * (1 - u) * slope))
            tl.store(out + step, tl.sum((1 - v) * u * slope))
            tl.store(out + 2 * step, tl.sum(v * (1 - u) * slope))
            tl.store(out + 3 * step, tl.sum(v * u * slope))
