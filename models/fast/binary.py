"""Binary cross-entropy chunk by chunk: every class stands alone."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from base.batch import void_of
from models.pixels import Chunk, chunks, full_precision, interpolation


class Targets:
    """What each class should say at each pixel: here 0, whatever the class.

    Attributes:
        counted: [H, N, 1, W], False where the loss is zero whatever the logits; None: nowhere.
    """

    counted: torch.Tensor | None = None

    def write(self, chunk: Chunk, out: torch.Tensor) -> None:
        """Write the targets of a chunk to `out`, [H, n, c, W]."""
        out.zero_()


class OneHot(Targets):
    """1 where the label names the class."""

    def __init__(
        self, labels: torch.Tensor, first_channel: int, classes: int, void_counts: bool = True
    ):
        """
        Args:
            labels: [N, H, W] uint8 channels.
            first_channel: label of the first class.
            classes: how many there are.
            void_counts: whether void is a target of zero; else the loss there is zero.
        """
        self.rows = labels.transpose(0, 1)[:, :, None]  # [H, N, 1, W]
        end, void = first_channel + classes, void_of(labels)
        assert end <= void, "the largest label is void"
        self.counted = None if void_counts else self.rows != void
        channels = torch.arange(first_channel, end, device=labels.device)
        self.channels = channels.to(labels.dtype)[:, None]

    def write(self, chunk: Chunk, out: torch.Tensor) -> None:
        images, classes = chunk
        torch.eq(self.rows[:, images], self.channels[classes], out=out)  # straight to floats


class Scores(Targets):
    """The sigmoid of a teacher's logits."""

    def __init__(self, teacher: torch.Tensor, size: tuple[int, int]):
        """Of logits, [N, C, h, w], upsampled to `size`, H and W."""
        self.teacher, self.size = teacher.detach(), size

    @functools.cached_property
    def bilinear(self) -> Bilinear:
        return Bilinear(full_precision(self.teacher[:1, :1]), self.size)

    def write(self, chunk: Chunk, out: torch.Tensor) -> None:
        self.bilinear.up(full_precision(self.teacher[chunk]), out).sigmoid_()


def in_chunks(
    inputs: torch.Tensor,
    gradient: torch.Tensor | None,
    size: tuple[int, int],
    targets: Targets,
    pos_weight: float = 1.0,
) -> torch.Tensor:
    """Sum of the binary cross-entropy over N, H and W, [C], as `pixel_mean` asks for it.

    With logit x, target y, weight of positives p, softplus s(x) = log(1 + eˣ) and sigmoid σ:

        loss = (1 - y) s(x) + p y s(-x) = (1 + (p - 1) y) s(x) - p y x
        d loss / d x = (1 + (p - 1) y) σ(x) - p y
    """
    bilinear = Bilinear(inputs, size)
    parts = chunks(inputs, size)
    total = inputs.new_zeros(inputs.shape[1])
    work = inputs.new_empty(3, inputs[parts[0]].shape[:2].numel() * math.prod(size))
    for part in parts:
        n, c = inputs[part].shape[:2]
        shape = (size[0], n, c, size[1])
        x, y, loss = work[:, : math.prod(shape)].view(3, *shape)
        bilinear.up(inputs[part], out=x)
        targets.write(part, y)
        torch.ops.aten.softplus.out(x, out=loss)
        if pos_weight != 1:
            loss.addcmul_(loss, y, value=pos_weight - 1)
        loss.addcmul_(x, y, value=-pos_weight)  # nearly cancels: per pixel, not in sums
        counted = None if targets.counted is None else targets.counted[:, part[0]]
        if counted is not None:
            loss.mul_(counted)
        total[part[1]] += loss.sum(3).sum((0, 1))
        if gradient is not None:
            slope = x.sigmoid_()
            if pos_weight != 1:
                slope.addcmul_(slope, y, value=pos_weight - 1)
            slope.sub_(y, alpha=pos_weight)
            if counted is not None:
                slope.mul_(counted)
            gradient[part] = bilinear.adjoint(slope)
    return total


class Bilinear:
    """`upsample` of chunks and its adjoint, as products with matrices.

    Bilinear upsampling is linear and separable, x → U_h x U_wᵀ, and no row of U_h or U_w has more
    than two weights. The pattern of the weights repeats gcd(h, H) times from the first row to the
    last, so U_h acts as that many blocks, each of which reads its own h / gcd(h, H) rows of x and a
    neighbour on either side: 3 rows make 16 at output stride 16. As exact as the products are:
    whoever calls it does so in `exact_products`.
    """

    def __init__(self, logits: torch.Tensor, size: tuple[int, int]):
        """From the sides of logits, [N, C, h, w] in full precision, to `size`, H and W."""
        (h, w), (H, W) = logits.shape[-2:], size
        self.size = size
        self.blocks = math.gcd(h, H)
        self.own = h // self.blocks  # rows of x that belong to a block
        self.across = interpolation(logits, w, W).t()  # U_wᵀ: [w, W]
        banded = F.pad(interpolation(logits, h, H), (1, 1))  # U_h: [H, 1 + h + 1]
        block = (self.blocks, H // self.blocks, self.own + 2)
        along_diagonal = banded.stride(0) * block[1] + self.own
        self.down = banded.as_strided(block, (along_diagonal, *banded.stride()))

    def up(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[n, c, h, w] → out: [H, n, c, W]. Rows lead, which makes the blocks views."""
        rows = F.pad(x.permute(2, 0, 1, 3), (0, 0, 0, 0, 0, 0, 1, 1))  # [1 + h + 1, n, c, w]
        rows = (rows.flatten(0, 2) @ self.across).view(len(rows), -1)  # [1 + h + 1, n·c·W]
        rows = rows.unfold(0, self.own + 2, self.own).transpose(1, 2)  # they overlap by two
        torch.bmm(self.down, rows, out=out.view(*self.down.shape[:2], -1))
        return out

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """[H, n, c, W] → [n, c, h, w]: from the gradient behind `up` to the one before it."""
        _, n, c, W = x.shape
        parts = torch.bmm(self.down.transpose(1, 2), x.view(*self.down.shape[:2], -1))
        parts = (parts.view(-1, W) @ self.across.t()).view(self.blocks, self.own + 2, n, c, -1)
        rows = parts[:, 1:-1]  # [blocks, own, n, c, w]; what overlaps goes to its owner
        rows[:-1, -1] += parts[1:, 0]
        rows[1:, 0] += parts[:-1, -1]
        return rows.flatten(0, 1).permute(1, 2, 0, 3)
