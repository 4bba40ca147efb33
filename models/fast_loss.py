"""The losses that methods call: what `models/loss.py` defines, in little time and memory.

Each equals, in value and gradient, the definition that `fast_way_of` names above it, and is
replaced by it where the fast way is switched off. Logits meet their targets at full resolution
part by part (`models/upsampling.py`): where every class stands alone in chunks, here; where they
share a softmax in bands (`models/softmax_bands.py`). Local POD is in `models/fast_pod.py`.

A new loss with a fast way is a definition there and a decorated function here, which the tests
then compare; one without is called from `models/loss.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch

from base.batch import void_of
from models import loss as definitions
from models.fast_pod import pod_distance
from models.softmax_bands import CrossEntropy, Distillation, in_bands
from models.upsampling import Bilinear, Chunk, chunks, full_precision, pixel_mean, size_of

P = ParamSpec("P")
Loss = Callable[P, torch.Tensor]

switched_on = True
FAST_WAYS: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {}  # by definition


# ------------------------------------------------------------------------------------ which way
def fast_way_of(definition: Loss[P]) -> Callable[[Loss[P]], Loss[P]]:
    """Decorate a function that equals `definition`; calling its name computes either of the two."""

    def decorate(fast: Loss[P]) -> Loss[P]:
        FAST_WAYS[definition] = fast

        @functools.wraps(definition)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
            return (fast if switched_on else definition)(*args, **kwargs)

        return chosen

    return decorate


@contextlib.contextmanager
def by_definition() -> Iterator[None]:
    """Inside, every loss is computed as `models/loss.py` writes it: for comparisons, and doubts."""
    global switched_on
    before, switched_on = switched_on, False
    try:
        yield
    finally:
        switched_on = before


# ------------------------------------------------------------------------------------ the losses
@fast_way_of(definitions.mbce)
def mbce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_channel: int,
    pos_weight: float = 1.0,
    void_counts: bool = True,
) -> torch.Tensor:
    targets = OneHot(labels, first_channel, logits.shape[1], void_counts)
    return pixel_mean(in_chunks, logits, size_of(labels), targets, pos_weight)


@fast_way_of(definitions.distillation)
def distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    size = size or size_of(teacher)
    return pixel_mean(in_chunks, logits, size, Scores(teacher, size))


@fast_way_of(definitions.auxiliary)
def auxiliary(logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    return pixel_mean(in_chunks, logits, size or size_of(logits), Targets())


@fast_way_of(definitions.cross_entropy)
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old: int = 1,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    return pixel_mean(in_bands, logits, size_of(labels), CrossEntropy(labels, old, weight))


@fast_way_of(definitions.soft_distillation)
def soft_distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    size = size or size_of(teacher)
    return pixel_mean(in_bands, logits, size, Distillation(teacher, size))


local_pod = fast_way_of(definitions.local_pod)(pod_distance)


# ---------------------------------------------------------------------------- binary cross-entropy
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
