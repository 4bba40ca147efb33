"""What methods with one sigmoid per class and no background channel have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from base.base_method import BaseMethod
from models.loss import chunks, full_precision, upsample
from trainer.optim import incremental_groups

THRESHOLD = 0.5  # a pixel is background where no class scores higher


class SigmoidMethod(BaseMethod):
    """An auxiliary head and one classifier per step, as the paper's network has them."""

    def head_sizes(self) -> list[int]:
        return [1, *self.task.classes_per_step]

    def parameter_groups(
        self, student: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        return incremental_groups(student, self.task.step, lr, weight_decay)

    def predict(self, logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Class of the highest score, background where none is over `THRESHOLD`.

        Chunk by chunk in the order of the classes, so that not all are at full size at once.
        """
        classes = logits[:, 1:]
        size = size or logits.shape[-2:]
        best = full_precision(logits.new_full((len(logits), *size), THRESHOLD))
        preds = torch.zeros_like(best, dtype=torch.int64)
        for images, some in chunks(classes, size):
            # Reference quirk: argmax of the scores, not of the logits, so classes whose scores
            # round to 1 tie and the one that arrived first wins.
            score, channel = upsample(classes[images, some], size).sigmoid_().max(dim=1)
            better = score > best[images]
            preds[images] = torch.where(better, some.start + 1 + channel, preds[images])
            best[images] = torch.maximum(score, best[images])
        return preds
