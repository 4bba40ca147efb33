"""MiB: Modeling the Background for Incremental Learning in Semantic Segmentation (CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from base.base_method import Terms, Total, setting
from base.base_model import BaseModel, ModelOutput
from base.batch import Batch
from models.fast.losses import cross_entropy, soft_distillation
from models.heads import split_background
from models.pixels import size_of
from trainer.methods.background import BackgroundMethod


class MiB(BackgroundMethod):
    """Unbiased losses: background may be an old class to the labels, a new one to the teacher."""

    label = "MiB"

    @dataclass(frozen=True)
    class Settings(BackgroundMethod.Settings):
        """Weights of the terms."""

        ce: float = setting(1.0, "weight of L_ce, with old classes and background as one")
        kd: float = setting(10.0, "weight of L_kd, with new classes and background as one")

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """New classes share what the previous step calls background."""
        if self.task.step > 0:
            background_head, *_, new = student.parts().heads
            split_background(new, background_head)

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        labels, logits = self.labels(batch), student.logits
        terms = {"ce": cross_entropy(logits, labels, self.known)}
        if teacher is not None:
            terms["kd"] = soft_distillation(logits, teacher.logits, size_of(labels))
        return terms
