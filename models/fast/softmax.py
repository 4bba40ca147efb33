"""Cross-entropy and distillation of a softmax, band by band.

In each loss the channels fall into two groups, one of which counts as a whole: the old ones that
labels do not tell apart, or the background of a teacher and what is new since. Let h_g be the
logarithm of the sum of exp over a group. Then

    p_c = P_g softmax_c inside the group, P_1 = σ(h_1 - h_2), P_2 = σ(h_2 - h_1),

and each group is summed from its own maximum, so that neither vanishes beside the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.nn.functional import logsigmoid

from base.batch import void_of
from models.pixels import Rows, bands, full_precision


class Term(ABC):
    """The loss of each pixel of a band, and its gradient.

    Attributes:
        behind: how many channels, the first ones, are given behind the others; so a group of
            channels is a slice.
    """

    behind = 0

    @abstractmethod
    def start(self, image: int) -> None:
        """The bands that follow are those of an image."""

    @abstractmethod
    def loss(self, x: torch.Tensor, rows: slice, with_gradient: bool) -> torch.Tensor:
        """[R, 1, W], the loss of the pixels of some rows.

        Args:
            x: logits, [R, C, W]; overwritten, with their gradient if that is wanted.
            rows: R rows of the image.
            with_gradient: whether it is.
        """


class ChannelGroup:
    """A group of channels, [R, c, W], whose memory holds logits, then exp of them, then more.

    Attributes:
        x: the logits below their maximum, and what comes after them.
        log_sum: h, [R, 1, W], once `exp_` is called; of no channels so low that P is 0.
        log_rest: h less the maximum.
    """

    def __init__(self, x: torch.Tensor):
        self.x, self.empty = x, x.shape[1] == 0
        if not self.empty:
            self.top = x.amax(1, keepdim=True)
            x.sub_(self.top)

    def exp_(self) -> None:
        self.sum = self.x.exp_().sum(1, keepdim=True)
        if self.empty:
            self.log_rest = torch.zeros_like(self.sum)
            self.log_sum = torch.full_like(self.sum, torch.finfo(self.sum.dtype).min / 4)
        else:
            self.log_rest = self.sum.log()
            self.log_sum = self.top + self.log_rest

    def softmax_(self, share: torch.Tensor) -> torch.Tensor:
        """After `exp_`: the softmax inside the group times a share of each pixel, [R, 1, W]."""
        return self.x if self.empty else self.x.mul_(share / self.sum)


class CrossEntropy(Term):
    """-log P_1 where the label is one of the first group, -log p_y elsewhere, 0 where void."""

    def __init__(self, labels: torch.Tensor, old: int, weight: torch.Tensor | None):
        """
        Args:
            labels: [N, H, W] channels.
            old: how many channels are the first group.
            weight: [N] of the images; 1 each when None.
        """
        self.labels, self.old, self.weight = labels, old, weight
        self.void = void_of(labels)

    def start(self, image: int) -> None:
        self.of_image = self.labels[image, :, None]  # [H, 1, W]
        self.factor = 1 if self.weight is None else self.weight[image].detach()

    def loss(self, x: torch.Tensor, rows: slice, with_gradient: bool) -> torch.Tensor:
        labels = self.of_image[rows]
        counted = (labels != self.void).to(x.dtype) * self.factor  # [R, 1, W]
        grouped = counted * (labels < self.old)
        single = counted - grouped
        target = (labels.long() - self.old).clamp_(min=0).masked_fill_(labels == self.void, 0)
        first, second = ChannelGroup(x[:, : self.old]), ChannelGroup(x[:, self.old :])
        at_target = x[:, :1] if second.empty else second.x.gather(1, target)
        first.exp_()
        second.exp_()
        odds = first.log_sum - second.log_sum
        loss = single * (second.log_rest - at_target - logsigmoid(-odds))
        loss -= grouped * logsigmoid(odds)
        if with_gradient:
            # Where the group is the target: P_1 - 1 = -P_2 of the softmax inside.
            p_1, p_2 = odds.sigmoid(), (-odds).sigmoid()
            first.softmax_(single * p_1 - grouped * p_2)
            slope = second.softmax_(counted * p_2)
            if not second.empty:
                slope.scatter_(1, target, slope.gather(1, target) - single)
        return loss


class Distillation(Term):
    """-1/K [Σ_{1 ≤ c < K} q_c log p_c + q_0 log P_2]; the second group: what is new, and 0."""

    behind = 1

    def __init__(self, teacher: torch.Tensor, size: tuple[int, int]):
        """Of the teacher's logits, [N, K, h, w], upsampled to `size`, H and W."""
        self.teacher = full_precision(teacher.detach())
        self.rows = Rows(self.teacher, size)

    def start(self, image: int) -> None:
        self.wide = self.rows.widen(self.teacher[image].roll(-self.behind, 0))

    def loss(self, x: torch.Tensor, rows: slice, with_gradient: bool) -> torch.Tensor:
        known = self.wide.shape[1]  # K
        teacher = self.rows.up(self.wide, rows, x.new_empty(len(x), known, x.shape[2]))
        first, second = ChannelGroup(teacher[:, : known - 1]), ChannelGroup(teacher[:, known - 1 :])
        first.exp_()
        second.exp_()
        odds = first.log_sum - second.log_sum
        q_others, q_background = odds.sigmoid(), (-odds).sigmoid()
        q = first.softmax_(q_others)  # [R, K - 1, W]

        first, second = ChannelGroup(x[:, : known - 1]), ChannelGroup(x[:, known - 1 :])
        inside = (q * first.x).sum(1, keepdim=True)
        first.exp_()
        second.exp_()
        odds = first.log_sum - second.log_sum
        loss = q_others * (first.log_rest - logsigmoid(odds)) - inside
        loss -= q_background * logsigmoid(-odds)
        if with_gradient:
            first.softmax_(odds.sigmoid()).sub_(q)
            second.softmax_((-odds).sigmoid() - q_background)
            x.div_(known)
        return loss.div_(known)


def in_bands(
    inputs: torch.Tensor, gradient: torch.Tensor | None, size: tuple[int, int], term: Term
) -> torch.Tensor:
    """Sum of a term over N, H and W, [1], as `pixel_mean` asks for it."""
    upsampling, parts = Rows(inputs, size), bands(inputs, size)
    total = inputs.new_zeros(1)
    work = inputs.new_empty(parts[0].stop, inputs.shape[1], size[1])
    for image, x in enumerate(inputs):
        term.start(image)
        wide = upsampling.widen(x.roll(-term.behind, 0))
        slope = None if gradient is None else torch.zeros_like(wide)
        for rows in parts:
            band = upsampling.up(wide, rows, out=work[: rows.stop - rows.start])
            total += term.loss(band, rows, gradient is not None).sum()
            if slope is not None:
                upsampling.add_adjoint(band, rows, slope)
        if gradient is not None and slope is not None:
            gradient[image] = upsampling.narrow(slope).roll(term.behind, 0)
    return total
