"""From feature resolution h×w to full resolution H×W, where no tensor of all classes ever exists.

What is needed there is worked out over parts of a few megabytes: over *chunks*, some classes of
some images, where every class stands alone, and over *bands*, some rows of one image with all its
classes, where they share a softmax. What outlives a part has h×w, or one class, or, of one image,
h×W. Used by the losses and wherever classes are predicted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes of a chunk or band at full resolution. On a CPU the three in work share the cache;
# elsewhere they are large enough that the device does not wait for the next call.
CPU_CHUNK, DEVICE_CHUNK = 4 * 2**20, 64 * 2**20

Chunk = tuple[slice, slice]  # images, classes: `logits[chunk]` is [n, c, h, w]


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, in full precision: [N, C, h, w] → [N, C, H, W]."""
    return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)


def size_of(maps: torch.Tensor) -> tuple[int, int]:
    """H and W of [..., H, W]."""
    height, width = maps.shape[-2:]
    return height, width


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float32 (float64 stays) whatever the mixed precision of the network."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices keep its digits, though the user allows TF32 or bfloat16.

    That is meant for networks; here it would cost the losses four of their digits.
    """
    # By name: torch adds mkldnn's only at import, so a type checker does not know it.
    backends = attrgetter("cuda.matmul", "mkldnn.matmul")(torch.backends)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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


def budget(logits: torch.Tensor) -> int:
    """How many numbers in full precision a part should have at most."""
    size = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    return size // full_precision(logits[:0]).itemsize


def chunks(logits: torch.Tensor, size: tuple[int, int]) -> list[Chunk]:
    """Cut [N, C, h, w] into parts that are small when upsampled to `size`.

    The first is the largest; those of an image come in the order of the classes.
    """
    planes = max(1, budget(logits) // math.prod(size))
    images = min(planes, len(logits))
    classes = planes // images
    return [
        (slice(image, image + images), slice(first, first + classes))
        for image in range(0, len(logits), images)
        for first in range(0, logits.shape[1], classes)
    ]


def interpolation(like: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """[after, before]: the identity upsampled, so to the bit what `upsample` multiplies by."""
    identity = torch.eye(before, dtype=like.dtype, device=like.device)
    return upsample(identity[None, None], (after, before))[0, 0]


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


def bands(logits: torch.Tensor, size: tuple[int, int]) -> list[slice]:
    """Cut the rows of an image of [N, C, h, w] into parts that are small when upsampled to `size`.

    The first is the largest.
    """
    rows = max(1, budget(logits) // (logits.shape[1] * size[1]))
    return [slice(row, min(row + rows, size[0])) for row in range(0, size[0], rows)]


class Rows:
    """`upsample` of one image band by band, and its adjoint, as products with matrices.

    x → U_h (x U_wᵀ): the product in brackets once for the image; of it a band reads the few rows
    that its own rows of U_h have weights for. Any sizes will do. As exact as the products are:
    whoever calls it does so in `exact_products`.
    """

    def __init__(self, logits: torch.Tensor, size: tuple[int, int]):
        """From the sides of logits, [N, C, h, w] in full precision, to `size`, H and W."""
        (h, w), (H, W) = logits.shape[-2:], size
        self.across = interpolation(logits, w, W)  # U_w: [W, w]
        self.down = interpolation(logits, h, H)  # U_h: [H, h]

    def _read(self, rows: slice) -> slice:
        """The rows before upsampling that a band depends on, without asking the device."""
        after, before = self.down.shape
        slack = 1e-6 * before  # where a centre meets a row, `upsample` may round to either side
        first, last = ((row + 0.5) * before / after - 0.5 for row in (rows.start, rows.stop - 1))
        return slice(max(0, math.floor(first - slack)), math.floor(last + slack) + 2)

    def widen(self, image: torch.Tensor) -> torch.Tensor:
        """[C, h, w] → [h, C, W]."""
        return image.transpose(0, 1) @ self.across.t()

    def up(self, wide: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """What `widen` returned → out: [R, C, W], a band."""
        read = self._read(rows)
        torch.mm(self.down[rows, read], wide[read].flatten(1), out=out.flatten(1))
        return out

    def add_adjoint(self, band: torch.Tensor, rows: slice, wide: torch.Tensor) -> None:
        """Add to the gradient behind `widen`, [h, C, W], the part of a band, [R, C, W]."""
        read = self._read(rows)
        wide[read].flatten(1).addmm_(self.down[rows, read].t(), band.flatten(1))

    def narrow(self, wide: torch.Tensor) -> torch.Tensor:
        """[h, C, W] → [C, h, w]: from the gradient behind `widen` to the one before it."""
        return (wide @ self.across).transpose(0, 1)


@exact_products()
def each_band(
    logits: torch.Tensor,
    size: tuple[int, int],
    what: Callable[[tuple[int, slice], torch.Tensor], None],
) -> None:
    """Call `what` for every band of every image, where nothing has a gradient.

    Args:
        logits: [N, C, h, w].
        size: H and W, to which they are upsampled.
        what: takes where the band lies, for [N, H, …], and its logits [R, C, W] in full precision,
            which it may overwrite.
    """
    logits = full_precision(logits.detach())
    rows, parts = Rows(logits, size), bands(logits, size)
    work = logits.new_empty(parts[0].stop, logits.shape[1], size[1])
    for number, image in enumerate(logits):
        wide = rows.widen(image)
        for band in parts:
            what((number, band), rows.up(wide, band, work[: band.stop - band.start]))


def highest_score(logits: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest sigmoid score of every pixel and whose it is.

    Reference quirk: argmax of the scores, not of the logits, so classes whose scores round to 1
    tie and the one that arrived first wins.

    Args and returns: as `highest_logit`, but for the score.
    """
    return _highest(logits, size, lambda _, values: values.sigmoid_())


def highest_logit(logits: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logit of every pixel and whose it is; of equal ones the first's.

    Args:
        logits: [N, C, h, w].
        size: H and W, to which they are upsampled.

    Returns:
        logit [N, H, W] in full precision, and channel [N, H, W] int64, 0 … C - 1.
    """
    return _highest(logits, size, lambda _, values: values)


def softmax_score(logits: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest class of every pixel, never the background, and its softmax probability.

    Args:
        logits: [N, C, h, w], background first; it takes part in the softmax.
        size: H and W, to which they are upsampled.

    Returns:
        probability [N, H, W] in full precision, and channel [N, H, W] int64, 1 … C - 1.
    """
    log_sum = upsample(logits[:, :1], size)[:, 0]  # of the channels so far

    def counted(where: slice | tuple[int, slice], values: torch.Tensor) -> torch.Tensor:
        log_sum[where] = torch.logaddexp(log_sum[where], values.logsumexp(1))
        return values

    best, channel = _highest(logits[:, 1:], size, counted)
    return (best - log_sum).exp_(), 1 + channel


def _highest(
    logits: torch.Tensor,
    size: tuple[int, int],
    scores: Callable[[slice | tuple[int, slice], torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores` turns the logits of some images or a band, [n, c, …], into what is compared.

    Bands take a tenth of the time where one class of one image is more than a chunk.
    """
    logits = full_precision(logits).contiguous()  # a few channels of many, were they innermost
    best = logits.new_full((len(logits), *size), -math.inf)
    winner = torch.zeros_like(best, dtype=torch.int64)
    if math.prod(size) > budget(logits):

        def judge(where: tuple[int, slice], values: torch.Tensor) -> None:
            best[where], winner[where] = scores(where, values).max(dim=1)

        each_band(logits, size, judge)
        return best, winner
    for images, classes in chunks(logits, size):
        score, channel = scores(images, upsample(logits[images, classes], size)).max(dim=1)
        better = score > best[images]
        winner[images] = torch.where(better, classes.start + channel, winner[images])
        best[images] = torch.maximum(score, best[images])
    return best, winner
