"""DKD: decomposed knowledge distillation (NeurIPS 2022, arXiv 2210.05941)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from base import base_method
from base.base_method import Terms, Total, setting
from base.base_model import BaseModel, ModelOutput
from base.batch import Batch
from models.fast.losses import auxiliary, distillation, mbce
from models.heads import start_head
from models.pixels import size_of
from trainer.methods.sigmoid import SigmoidMethod


class DKD(SigmoidMethod):
    """One sigmoid per class, an auxiliary head for new classes, distillation of decomposed logits.

    Terms: L_mbce on the new classes, L_ac on the auxiliary head, and at steps > 0 L_kd on the old
    classes' logits and L_dkd on their positive and negative parts.
    """

    label = "DKD"
    learns_old = False

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """Weights of the terms, and of the positives in L_mbce."""

        pos_weight: float = setting(1.0, "weight of a class's own pixels in L_mbce")
        mbce: float = setting(1.0, "weight of L_mbce, every new class against the rest")
        kd: float = setting(5.0, "weight of L_kd, the old classes' logits")
        dkd_pos: float = setting(5.0, "weight of L_dkd on the positive parts of the logits")
        dkd_neg: float = setting(5.0, "weight of L_dkd on the negative parts of the logits")
        ac: float = setting(1.0, "weight of L_ac; 0: new classifiers start at random")

    @property
    def wants(self) -> frozenset[str]:
        """Decomposed logits, where there is a teacher to compare them with."""
        return frozenset({"pos_neg"} if self.needs_teacher else ())

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """Start the new classifier from the auxiliary one, unless that is switched off.

        It has learnt to say "none of these" on every pixel, which is what a new class should start
        with.
        """
        if self.task.step > 0 and self.settings.ac > 0:
            auxiliary_head, *_, new = student.parts().heads
            start_head(new, auxiliary_head)

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        labels, logits = batch.labels, student.logits  # [N, H, W], [N, 1 + C, h, w]
        size, new = size_of(labels), self.task.new_channels
        terms = {
            "mbce": mbce(logits[:, new], labels, new.start, self.settings.pos_weight),
            "ac": auxiliary(logits[:, :1], size),
        }
        if teacher is not None:
            old = self.task.old_channels
            count = len(self.task.old)  # pos and neg have no channel of the auxiliary head
            (pos, neg), (old_pos, old_neg) = student.decomposed(), teacher.decomposed()
            terms |= {
                "kd": distillation(logits[:, old], teacher.logits[:, old], size),
                "dkd_pos": distillation(pos[:, :count], old_pos),
                "dkd_neg": distillation(neg[:, :count], old_neg),
            }
        return terms
