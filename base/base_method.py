"""The contract between the training loop and a method.

The loop never asks which method is running; a method never touches optimizer, scaler or ranks. A
method lives in one file of `trainer/methods/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from base.base_model import HeadPlan, ModelOutput
from base.task import Task


class BaseMethod(ABC):
    """One way to train a step.

    Attributes:
        learns_old: whether a loss term reads the labels of old classes.
        settings: keys of `hyperparameter` that this method reads, each with its default. Keys that
            are names of loss terms are the weights of the terms.
        task: the step.
        hyperparameter: the config's values over the defaults.
    """

    learns_old: ClassVar[bool]
    settings: ClassVar[Mapping[str, float]] = {}

    def __init__(self, task: Task, hyperparameter: Mapping[str, float]):
        self.task = task
        self.hyperparameter = {
            name: float(hyperparameter.get(name, default))
            for name, default in self.settings.items()
        }

    @property
    @abstractmethod
    def needs_teacher(self) -> bool:
        """Whether the loop shall run the previous step's model beside the student."""

    @property
    def wants(self) -> frozenset[str]:
        """Names out of `base_model.OUTPUTS`: what the losses read beside the logits."""
        return frozenset()

    @abstractmethod
    def heads(self) -> HeadPlan:
        """Which heads the model of this step has."""

    @abstractmethod
    def prepare(self, student: nn.Module) -> None:
        """Change the student before the step: how a new head starts, what is not trained.

        Called with the previous step's weights loaded, before the optimizer is made and before a
        resumed checkpoint is loaded.
        """

    @abstractmethod
    def parameter_groups(
        self, student: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups `{"name", "params", "lr", "weight_decay"}`.

        Every trainable parameter is in exactly one; the caller asserts it.
        """

    @abstractmethod
    def losses(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss terms of a batch.

        Args:
            student: outputs at feature resolution.
            teacher: the previous step's outputs without gradient; None unless `needs_teacher`.
            labels: [N, H, W] uint8 channels, 255 = void.

        Returns:
            Term name → per-class values; each name is a key of `settings`, its weight.
        """

    @abstractmethod
    def predict(self, logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Class of every pixel.

        Args:
            logits: [N, 1 + C, h, w].
            size: H and W of the image, to which they are upsampled; h and w when None.

        Returns:
            preds [N, H, W] int64 channels, 0 = background.
        """
