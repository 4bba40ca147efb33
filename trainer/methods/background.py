"""What methods with a channel of background, whose answer is the largest logit, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from base import base_method
from base.base_method import BaseMethod, setting
from base.base_model import BaseModel, HeadPlan, ModelOutput
from base.batch import Batch, void_of
from models.pixels import highest_logit, size_of, softmax_score
from trainer.optim import three_groups
from utils.labels import BACKGROUND


class BackgroundMethod(BaseMethod):
    """The network of MiB, PLOP and SDR: channel 0 is background, every part learns alike.

    Their decoder has no dropout, and all its parts have one learning rate. A new head starts at
    random, with the weights that PyTorch draws, unless a method says otherwise.
    """

    family = "background"
    learns_old = False
    replay_confidence = None
    dropout = False

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """What all of them share."""

        official: bool = setting(
            False, "as the authors' code has it: void pixels are trained as background"
        )

    @property
    def known(self) -> int:
        """How many channels the previous step has, background among them: K of the papers."""
        return 1 + len(self.task.old)

    def heads(self) -> HeadPlan:
        return HeadPlan((1, *self.task.classes_per_step), kaiming_normal=False)

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """Leave the new head as it is."""

    def parameter_groups(
        self, student: BaseModel, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        return three_groups(student, lr, weight_decay)

    def labels(self, batch: Batch) -> torch.Tensor:
        """[N, H, W]: the labels of a batch, void as the setting `official` has it."""
        if not self.settings.official:
            return batch.labels
        return batch.labels.masked_fill(batch.labels == void_of(batch.labels), BACKGROUND)

    def predict(self, output: ModelOutput, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Channel of the largest logit."""
        return highest_logit(output.logits, size or size_of(output.logits))[1]

    def confident(
        self, output: ModelOutput, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest class and its probability in the softmax over background and classes."""
        score, channel = softmax_score(output.logits, size)
        return channel, score
