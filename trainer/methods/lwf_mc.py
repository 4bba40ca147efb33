"""LwF-MC: multi-class Learning without Forgetting (Rebuffi et al., iCaRL, CVPR 2017), as MiB's code
has it for segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from base.base_method import Terms, Total, setting
from base.base_model import ModelOutput
from base.batch import Batch
from models.fast.losses import distillation, mbce
from models.pixels import size_of
from trainer.methods.background import BackgroundMethod


class LwFMC(BackgroundMethod):
    """One sigmoid each for background and classes; the old ones imitate the teacher's scores."""

    label = "LwF-MC"
    learns_old = True

    @dataclass(frozen=True)
    class Settings(BackgroundMethod.Settings):
        """Weights of the terms."""

        bce: float = setting(1.0, "weight of the binary cross-entropy of every channel")
        kd: float = setting(10.0, "weight of L_kd, the old channels' scores")

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        labels, logits = self.labels(batch), student.logits
        terms = {"bce": mbce(logits, labels, 0, void_counts=False)}
        if teacher is not None:
            terms["kd"] = distillation(logits[:, : self.known], teacher.logits, size_of(labels))
        return terms
