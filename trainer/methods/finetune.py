"""Plain fine-tuning, the lower bound: no distillation, nothing is protected from forgetting."""

from __future__ import annotations

import torch
from torch import nn

from base.base_model import ModelOutput
from models.fast_loss import mbce
from trainer.methods.sigmoid import SigmoidMethod


class Finetune(SigmoidMethod):
    """The network of DKD trained by L_mbce alone, over all seen classes.

    What a step's masks do not name is background, so the old classes are taught to be background:
    catastrophic forgetting as the field shows it. The new classifier starts at random and the
    auxiliary head stays as it is, so that a DKD base step can be the starting point.
    """

    learns_old = True
    settings = {"pos_weight": 1, "mbce": 1}  # noqa: RUF012

    @property
    def needs_teacher(self) -> bool:
        return False

    def prepare(self, student: nn.Module) -> None:
        """Take the auxiliary head, which no term here reaches, out of training."""
        student.cls[0].requires_grad_(False)

    def losses(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"mbce": mbce(student.logits[:, 1:], labels, 1, self.hyperparameter["pos_weight"])}
