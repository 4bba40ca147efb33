"""SSUL and, with a memory, SSUL-M: Semantic Segmentation with Unknown Label for Exemplar-based
Class-Incremental Learning (NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from base import base_method
from base.base_method import BaseMethod, Terms, Total, setting
from base.base_model import BaseModel, HeadPlan, ModelOutput
from base.batch import Batch, void_of
from models.fast.losses import mbce
from models.heads import start_head
from models.pixels import full_precision, highest_score, size_of, upsample
from trainer.optim import HEAD_LR, group, three_groups
from utils.labels import BACKGROUND

# The labels of the loss are int32: channels, and at the end of the range
VOID = torch.iinfo(torch.int32).max
UNKNOWN = VOID - 1
BACKGROUND_LR = 1e-4  # at steps > 0 background's head learns this many times slower


class SSUL(BaseMethod):
    """Everything but the new head is frozen; background is split into itself and the unknown.

    Each channel has a sigmoid. Objects of no class that is labelled, in background where a saliency
    map says so, are "unknown", a channel of its own; a new class's head starts as a copy of it. The
    previous model's confident classes are labels of background.
    """

    label = "SSUL"
    family = "unknown"
    learns_old = True
    replay_confidence = 0.7
    answers_from = frozenset({"unknown"})
    wants = answers_from

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """Weight of the term, and what labels are made of."""

        bce: float = setting(1.0, "weight of the binary cross-entropy of every channel")
        confidence: float = setting(
            0.7, "score from which the previous model's answer labels background", most=1
        )
        unknown: str = setting(
            "salient",
            "which background pixels are unknown: salient: where a map of "
            "data_loader.args.saliency_dir says so, all: every one",
            choices=("salient", "all"),
        )
        official: bool = setting(
            False,
            "as the authors' code has it: labels of replayed images are read one channel off",
        )

    @property
    def reads_saliency(self) -> bool:
        return self.settings.unknown == "salient"

    def heads(self) -> HeadPlan:
        return HeadPlan((1, *self.task.classes_per_step), kind="block", unknown=True)

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """The new head starts as the unknown one; all but these two and background's is frozen."""
        if self.task.step == 0:
            return
        trained = trained_heads(student)
        start_head(trained["new"], trained["unknown"])
        student.requires_grad_(False)
        for head in trained.values():
            head.requires_grad_(True)
        student.freeze()  # their BatchNorm again, where it is frozen

    def parameter_groups(
        self, student: BaseModel, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        if self.task.step == 0:
            return three_groups(student, lr, weight_decay, HEAD_LR)
        lrs = {"new": lr, "unknown": lr, "background": BACKGROUND_LR * lr}
        return [
            group(name, head, lr=lrs[name], weight_decay=weight_decay)
            for name, head in trained_heads(student).items()
        ]

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        """The mean over pixels that are not void; the sum over channels is the trainer's."""
        labels = self.targets(batch, teacher)
        counted = (labels != VOID).to(full_precision(student.logits[:0])).mean()
        both = total(torch.stack([counted, torch.ones_like(counted)]))  # ranks are of equal size
        share = (both[0] / both[1]).clamp(min=1 / labels.numel())
        unknown = mbce(student.require("unknown"), labels, UNKNOWN, void_counts=False)
        classes = mbce(student.logits, labels, BACKGROUND, void_counts=False)
        return {"bce": torch.cat([unknown, classes]) / share}

    def targets(self, batch: Batch, teacher: ModelOutput | None) -> torch.Tensor:
        """Labels with the unknown, and with what the previous model is sure of: [N, H, W] int32."""
        void = batch.labels == void_of(batch.labels)
        labels = batch.labels.int().masked_fill(void, VOID)
        unknown = labels == BACKGROUND
        if self.settings.unknown == "salient":
            assert batch.saliency is not None, "the checks ask for maps"
            unknown &= batch.saliency > 0
        targets = labels.masked_fill(unknown, UNKNOWN)
        if self.settings.official and batch.replayed is not None:
            # Reference quirk: the order of channels there is unknown, background, classes, but the
            # ids of replayed images are not moved up by one.
            off = torch.where(labels == BACKGROUND, UNKNOWN, labels - 1).masked_fill(void, VOID)
            targets = torch.where(batch.replayed[:, None, None], off, targets)
        if teacher is not None:
            channel, score = self.confident(teacher, size_of(labels))
            sure = (score >= self.settings.confidence) & (score > 0)
            sure &= (targets == BACKGROUND) | (targets == UNKNOWN)
            targets = torch.where(sure, channel.int(), targets)
        return targets

    def predict(self, output: ModelOutput, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Class of the highest score; the unknown's is added to that of background."""
        size = size or size_of(output.logits)
        score, index = highest_score(output.logits[:, 1:], size)
        background = sum(scores(output, size))
        return torch.where(score > background, 1 + index, BACKGROUND)

    def confident(
        self, output: ModelOutput, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class of the highest score, and the score: 0 where background or the unknown has more."""
        score, index = highest_score(output.logits[:, 1:], size)
        wins = score > torch.maximum(*scores(output, size))
        return 1 + index, score * wins


def scores(output: ModelOutput, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of background and of the unknown, each [N, H, W]."""
    background, unknown = output.logits[:, :1], output.require("unknown")
    return upsample(background, size)[:, 0].sigmoid(), upsample(unknown, size)[:, 0].sigmoid()


def trained_heads(student: BaseModel) -> dict[str, torch.nn.Module]:
    """The heads that learn at steps > 0."""
    parts = student.parts()
    assert parts.unknown is not None, "the plan has an unknown head"
    return {"new": parts.heads[-1], "unknown": parts.unknown, "background": parts.heads[0]}
