"""The classifiers: one 1×1 convolution per step, the auxiliary head in front, decomposed logits.

The paper's names: G_t for a step's classifier, H_t for the auxiliary one. There is no background
channel: a pixel is background when no class is over 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Heads(nn.ModuleList):
    """`heads[0]` is the auxiliary head, `heads[1 + t]` the classifier of step t."""

    def __init__(self, channels: int, sizes: Sequence[int]):
        """
        Args:
            channels: of the features.
            sizes: outputs per head, [1, classes of step 0, classes of step 1, …].
        """
        super().__init__(nn.Conv2d(channels, size, 1) for size in sizes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, channels, h, w] → logits [N, 1 + C, h, w].

        The auxiliary head sees detached features: it learns from them without shaping them.
        """
        auxiliary, *classifiers = self
        logits = [
            F.conv2d(features.detach(), *_stacked([auxiliary])),
            F.conv2d(features, *_stacked(classifiers)),
        ]
        return torch.cat(logits, dim=1)

    def decomposed(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positive and negative part of each class logit, without bias and auxiliary head.

        Features are non-negative, so the sign of a contribution is the sign of its weight:
        pos + neg + bias = logit. Source: the paper's decomposition of logits for L_dkd.

        Returns:
            pos and neg, each [N, C, h, w].
        """
        _, *classifiers = self
        weight, _ = _stacked(classifiers)
        return F.conv2d(features, weight.clamp(min=0)), F.conv2d(features, weight.clamp(max=0))

    def start_from_auxiliary(self) -> None:
        """Copy the auxiliary head into every row of the newest classifier.

        It has learnt to say "none of these" on every pixel, which is what a new class should start
        with.
        """
        with torch.no_grad():
            self[-1].weight.copy_(self[0].weight.expand_as(self[-1].weight))
            self[-1].bias.copy_(self[0].bias.expand_as(self[-1].bias))


def _stacked(heads: Iterable[nn.Conv2d]) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads as one: weight [C, channels, 1, 1] and bias [C].

    The weights are stacked as matrices: so their gradients lie in memory as the parameters do, and
    processes exchange them without a copy.
    """
    weight = torch.cat([head.weight.flatten(1) for head in heads])
    return weight[..., None, None], torch.cat([head.bias for head in heads])
