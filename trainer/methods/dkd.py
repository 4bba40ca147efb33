"""DKD: decomposed knowledge distillation (NeurIPS 2022, arXiv 2210.05941)."""

from __future__ import annotations

import torch
from torch import nn

from base.base_model import ModelOutput
from models.loss import auxiliary, distillation, mbce
from trainer.methods.sigmoid import SigmoidMethod


class DKD(SigmoidMethod):
    """One sigmoid per class, an auxiliary head for new classes, distillation of decomposed logits.

    Terms: L_mbce on the new classes, L_ac on the auxiliary head, and at steps > 0 L_kd on the old
    classes' logits and L_dkd on their positive and negative parts.
    """

    learns_old = False
    settings = {"pos_weight": 1, "mbce": 1, "kd": 5, "dkd_pos": 5, "dkd_neg": 5, "ac": 1}  # noqa: RUF012

    @property
    def needs_teacher(self) -> bool:
        return self.task.step > 0

    @property
    def wants(self) -> frozenset[str]:
        """Decomposed logits, where there is a teacher to compare them with."""
        return frozenset({"pos_neg"} if self.needs_teacher else ())

    def prepare(self, student: nn.Module) -> None:
        """Start the new classifier from the auxiliary one, unless that is switched off."""
        if self.task.step > 0 and self.hyperparameter["ac"] > 0:
            student.cls.start_from_auxiliary()

    def losses(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size, new = labels.shape[-2:], self.task.new_channels
        logits = student.logits  # [N, 1 + C, h, w]
        terms = {
            "mbce": mbce(logits[:, new], labels, new.start, self.hyperparameter["pos_weight"]),
            "ac": auxiliary(logits[:, :1], size),
        }
        if teacher is not None:
            old = self.task.old_channels
            count = len(self.task.old)  # pos and neg have no channel of the auxiliary head
            terms |= {
                "kd": distillation(logits[:, old], teacher.logits[:, old], size),
                "dkd_pos": distillation(student.pos[:, :count], teacher.pos),
                "dkd_neg": distillation(student.neg[:, :count], teacher.neg),
            }
        return terms
