"""PLOP: Learning without Forgetting for Continual Semantic Segmentation (CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from base import base_method
from base.base_method import StepContext, Terms, Total, saved_tensor, setting
from base.base_model import ModelOutput
from base.batch import Batch, void_of
from models.fast.losses import cross_entropy, local_pod
from models.pixels import each_band, full_precision, size_of
from trainer.methods.mib import MiB
from utils.errors import UserError
from utils.labels import BACKGROUND

BINS = 100  # of the histograms of uncertainty
FLOOR = 0.001  # of a threshold
LARGEST = torch.finfo(torch.float32).max
SMALLEST_MAP = 4  # Local POD cuts a side into as many windows


class PLOP(MiB):
    """Local POD on the maps of the network, and the teacher's sure answers as labels of background.

    New classes start from background as in MiB. How sure is sure enough, the median uncertainty of
    each class, is found in one pass over the training images before the step.
    """

    label = "PLOP"

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """Weights of the terms, and what is sure."""

        ce: float = setting(1.0, "weight of L_ce on labels and pseudo-labels")
        pod: float = setting(0.01, "weight of Local POD on the four stages and the decoder's map")
        pod_logits: float = setting(0.0005, "weight of Local POD on the logits")
        uncertainty: str = setting(
            "official",
            "of the teacher's answer: official: as the authors' code computes it and the median of "
            "a class, paper: as the paper defines them",
            choices=("official", "paper"),
        )

    def __init__(self, task: Any, given: Mapping[str, Any]):
        super().__init__(task, given)
        self.channels = 1 + len(task.seen)  # K_t of the paper
        self.thresholds = torch.zeros(self.channels)

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({"stages", "features"} if self.needs_teacher else ())

    # ----------------------------------------------------------------------------- pseudo-labels
    def begin_step(self, context: StepContext) -> None:
        """The thresholds of the step: per class, over all ranks."""
        if context.teacher is None:
            return
        device = next(context.student.parameters()).device
        counts = torch.zeros(self.channels * BINS, dtype=torch.float64, device=device)
        for number, batch in enumerate(context.batches(0)):
            output = context.teacher(batch.images, () if number else self.wants)
            if number == 0:
                maps_of(output)  # told now rather than after the pass
            answer, unsure = self.answers(output, size_of(batch.labels))
            hidden = batch.labels == BACKGROUND
            bins = (BINS * unsure[hidden]).long().clamp(max=BINS - 1)
            counts += torch.bincount(BINS * answer[hidden] + bins, minlength=len(counts))
        histogram = context.total(counts).view(self.channels, BINS)
        self.thresholds = thresholds(histogram, self.settings.uncertainty)

    def answers(
        self, teacher: ModelOutput, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher sees at each pixel, and how unsure it is.

        Reference quirk (`uncertainty` "official"): the mean over the K classes instead of the sum,
        divided by log K_t once more; so it is at most 1 / (K log K_t) and fills few of the bins.

        Returns:
            channel [N, H, W] int64, and the entropy of the softmax, scaled, [N, H, W].
        """
        images, old = teacher.logits.shape[:2]
        channel = teacher.logits.new_empty((images, *size), dtype=torch.int64)
        entropy = full_precision(teacher.logits[:0]).new_empty(channel.shape)

        def judge(place: tuple[int, slice], logits: torch.Tensor) -> None:
            channel[place] = logits.argmax(1)
            q = logits.softmax(1)
            entropy[place] = -(q.add(1e-8).log_().mul_(q)).sum(1)

        each_band(teacher.logits, size, judge)
        if self.settings.uncertainty == "official":
            return channel, entropy / (old * math.log(old + 1e-8) * math.log(self.channels))
        return channel, entropy / math.log(old)

    def pseudo_labels(
        self, labels: torch.Tensor, teacher: ModelOutput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Background as the teacher sees it, void where it is unsure.

        Returns:
            labels [N, H, W] of the same type, and ν [N], the sure share of an image's background.
        """
        void = void_of(labels)
        answer, unsure = self.answers(teacher, size_of(labels))
        self.thresholds = self.thresholds.to(unsure)
        hidden = labels < self.known
        sure = hidden & (unsure < self.thresholds[answer])
        filled = torch.where(sure, answer.to(labels.dtype), void)
        share = sure.sum((1, 2)) / (hidden.sum((1, 2)).to(unsure) + 1e-6)
        return torch.where(hidden, filled, labels), share

    # ------------------------------------------------------------------------------------ losses
    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        logits = student.logits
        if teacher is None:
            return {"ce": cross_entropy(logits, batch.labels)}
        labels, share = self.pseudo_labels(batch.labels, teacher)
        summed = logits[:, :1] + logits[:, self.known :].sum(1, keepdim=True)
        reduced = torch.cat([summed, logits[:, 1 : self.known]], 1)  # to the teacher's channels
        maps = [local_pod(*pair) for pair in zip(maps_of(student), maps_of(teacher), strict=True)]
        scale = math.sqrt(self.channels / len(self.task.new)) / (len(maps) + 1)
        return {
            "ce": cross_entropy(logits, labels, weight=share),
            "pod": scale * torch.cat(maps),
            "pod_logits": scale * local_pod(reduced, teacher.logits),
        }

    def state(self) -> dict[str, Any]:
        # Where nothing, or everything, is sure: as numbers that decide the same.
        finite = self.thresholds.nan_to_num(nan=-LARGEST, posinf=LARGEST)
        return {"thresholds": finite.cpu()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        saved = saved_tensor(state, "thresholds", (self.channels,))
        self.thresholds = torch.where(saved.abs() < LARGEST, saved, saved * torch.inf)


def maps_of(output: ModelOutput) -> tuple[torch.Tensor, ...]:
    """The maps that Local POD compares beside the logits: four stages and what the heads read.

    Raises:
        UserError: one is too small to be cut.
    """
    maps = (*(output.stages or ()), output.require("features"))
    smallest = min(min(size_of(each)) for each in maps)
    if smallest < SMALLEST_MAP:
        raise UserError(
            f"a map of the network has a side of {smallest}, but PLOP cuts each into windows of a "
            f"quarter; it needs {SMALLEST_MAP} or more: enlarge "
            "data_loader.args.train.args.transform_args.crop_size."
        )
    return maps


def thresholds(histogram: torch.Tensor, way: str = "official") -> torch.Tensor:
    """The median uncertainty of each class, interpolated inside its bin, and at least `FLOOR`.

    Reference quirk ("official"): the mass before a bin is taken for the sum of the indices of the
    bins before it, and the bin is read at an index that float arithmetic sometimes makes one too
    small. Where no bin then holds the median, the threshold is infinite, `FLOOR`, or NaN.

    Args:
        histogram: [K_t, bins], number of background pixels by the teacher's answer.
        way: "official" or "paper".

    Returns:
        [K_t] float64, on the CPU.
    """
    counts = histogram.double().cpu()
    bins = counts.shape[1]
    half = counts.sum(1, keepdim=True) / 2
    start = torch.arange(bins, dtype=torch.float64) / bins
    if way == "official":
        counts = counts[:, (start * bins).long()]
        sums = (start * bins).cumsum(0)
        before = (sums - start * bins).expand_as(counts)
        beyond = sums[-1].expand_as(half)
    else:
        before = counts.cumsum(1) - counts
        beyond = before[:, -1:]
    holds = (before <= half) & (half <= before + counts)
    found = holds.any(1, keepdim=True)
    place = torch.where(found, holds.int().argmax(1, keepdim=True), bins - 1)
    mass = torch.where(found, before.gather(1, place), beyond)
    median = start[place] + (half - mass) / counts.gather(1, place) / bins
    median = torch.where(half > 0, median, 0).clamp(min=FLOOR)  # NaN stays
    return median[:, 0]
