"""LwF: Learning without Forgetting (ECCV 2016), as MiB's code has it for segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from base.base_method import Terms, Total, setting
from base.base_model import ModelOutput
from base.batch import Batch
from models.fast.losses import cross_entropy, soft_distillation
from models.pixels import size_of
from trainer.methods.background import BackgroundMethod


class LwF(BackgroundMethod):
    """Cross-entropy, and distillation of the old channels' softmax.

    Both are blind to the shift of the background: old classes are background to the labels, new
    ones to the teacher.
    """

    label = "LwF"
    learns_old = True

    @dataclass(frozen=True)
    class Settings(BackgroundMethod.Settings):
        """Weights of the terms."""

        ce: float = setting(1.0, "weight of L_ce, the cross-entropy over background and classes")
        kd: float = setting(100.0, "weight of L_kd, the softmax over the old channels")

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        labels, logits = self.labels(batch), student.logits
        terms = {"ce": cross_entropy(logits, labels)}
        if teacher is not None:
            old = logits[:, : self.known]
            terms["kd"] = soft_distillation(old, teacher.logits, size_of(labels))
        return terms
