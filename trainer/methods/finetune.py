"""Plain fine-tuning, the lower bound: no distillation, nothing is protected from forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from base import base_method
from base.base_method import Terms, Total, setting
from base.base_model import BaseModel, ModelOutput
from base.batch import Batch
from models.fast.losses import mbce
from trainer.methods.sigmoid import SigmoidMethod


class Finetune(SigmoidMethod):
    """The network of DKD trained by L_mbce alone, over all seen classes.

    What a step's masks do not name is background, so the old classes are taught to be background:
    catastrophic forgetting as the field shows it. The new classifier starts at random and the
    auxiliary head stays as it is, so that a DKD base step can be the starting point.
    """

    learns_old = True
    needs_teacher = False

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """Weight of the term, and of the positives in it."""

        pos_weight: float = setting(1.0, "weight of a class's own pixels in L_mbce")
        mbce: float = setting(1.0, "weight of L_mbce, every seen class against the rest")

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """Take the auxiliary head, which no term here reaches, out of training."""
        student.parts().heads[0].requires_grad_(False)

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        pos_weight = self.settings.pos_weight
        return {"mbce": mbce(student.logits[:, 1:], batch.labels, 1, pos_weight)}
