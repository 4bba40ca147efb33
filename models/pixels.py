"""From feature resolution h×w to the pixels of the image, H×W, and which class wins there.

No tensor of all classes ever exists at full resolution. What is needed there is worked out over
parts of a few megabytes: over *chunks*, some classes of some images, where every class stands
alone, and over *bands*, some rows of one image with all its classes, where they share a softmax.
What outlives a part has h×w, or one class, or, of one image, h×W.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
import torch.nn.functional as F

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
