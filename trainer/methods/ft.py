"""FT: fine-tuning by cross-entropy, the lower bound of the methods with a softmax."""

from __future__ import annotations

from dataclasses import dataclass

from base.base_method import Terms, Total, setting
from base.base_model import ModelOutput
from base.batch import Batch
from models.fast.losses import cross_entropy
from trainer.methods.background import BackgroundMethod


class FT(BackgroundMethod):
    """Nothing is protected: what a step's masks do not name is learnt as background."""

    label = "FT"
    learns_old = True
    needs_teacher = False

    @dataclass(frozen=True)
    class Settings(BackgroundMethod.Settings):
        """Weight of the term."""

        ce: float = setting(1.0, "weight of L_ce, the cross-entropy over background and classes")

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        return {"ce": cross_entropy(student.logits, self.labels(batch))}
