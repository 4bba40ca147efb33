"""What the loop knows of a model: named outputs, and a `train()` that respects frozen parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class ModelOutput(NamedTuple):
    """What a forward pass returns, at feature resolution h×w.

    Attributes:
        logits: [N, 1 + C, h, w]; channel 0 is the auxiliary head.
        pos: [N, C, h, w] sum of positive weights times features; None unless asked for.
        neg: [N, C, h, w] the same with the negative weights.
    """

    logits: torch.Tensor
    pos: torch.Tensor | None = None
    neg: torch.Tensor | None = None


class BaseModel(nn.Module):
    """A module some parts of which stay in eval mode whatever `train()` says."""

    def __init__(self, *, frozen_bn: bool = False, dropout: bool = True):
        """
        Args:
            frozen_bn: BatchNorm keeps its statistics, and its affine parameters are not trained.
            dropout: whether dropout is active in train mode.
        """
        super().__init__()
        self.frozen_bn, self.dropout = frozen_bn, dropout

    def freeze(self) -> None:
        """Take the affine parameters of frozen BatchNorm out of training; call once when built."""
        if self.frozen_bn:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(False)

    def channels_last(self) -> None:
        """Lay the weights out with the channels innermost, and with them all features."""
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> BaseModel:
        """Switch to train mode, except what is frozen."""
        super().train(mode)
        for module in self.modules():
            if (self.frozen_bn and isinstance(module, _BatchNorm)) or (
                not self.dropout and isinstance(module, nn.Dropout)
            ):
                module.eval()
        return self
