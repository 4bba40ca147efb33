"""What methods with one sigmoid per class and no background channel have in common."""

from __future__ import annotations

from typing import Any

import torch

from base.base_method import BaseMethod
from base.base_model import BaseModel, HeadPlan, ModelOutput
from models.pixels import highest_score, size_of
from trainer.optim import incremental_groups
from utils.labels import BACKGROUND

THRESHOLD = 0.5  # a pixel is background where no class scores higher


class SigmoidMethod(BaseMethod):
    """An auxiliary head and one classifier per step, as the paper's network has them."""

    family = "auxiliary"

    @property
    def dropout(self) -> bool:
        """At step 0 only, as in the published code."""
        return self.task.step == 0

    def heads(self) -> HeadPlan:
        return HeadPlan((1, *self.task.classes_per_step), detached_first=True)

    def parameter_groups(
        self, student: BaseModel, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        return incremental_groups(student, self.task.step, lr, weight_decay)

    def predict(self, output: ModelOutput, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Class of the highest score, background where none is over `THRESHOLD`."""
        channel, score = self.confident(output, size or size_of(output.logits))
        return torch.where(score > THRESHOLD, channel, BACKGROUND)

    def confident(
        self, output: ModelOutput, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class of the highest score, and the score."""
        score, index = highest_score(output.logits[:, 1:], size)
        return 1 + index, score
