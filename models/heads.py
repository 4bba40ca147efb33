"""The classifiers of a model, by plan: one per step, 1×1 convolutions or small blocks.

The paper's names: G_t for a step's classifier, H_t for the auxiliary one. What a channel means,
auxiliary score, background or class, is the method's word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from base.base_model import HeadPlan


def make_head(channels: int, outputs: int, kind: str) -> nn.Module:
    """A head of `HeadPlan.kind`: features [N, channels, h, w] → logits [N, outputs, h, w].

    Source of the block: Cha et al., SSUL (NeurIPS 2021), the heads of its published code.
    """
    if kind == "conv1x1":
        return nn.Conv2d(channels, outputs, 1)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, outputs, 1),
    )


def start_head(new: nn.Module, source: nn.Module) -> None:
    """Copy a head of one output, BatchNorm included, into every row of a new one."""
    values = source.state_dict()
    for name, value in new.state_dict().items():
        value.copy_(values[name].expand_as(value))


@torch.no_grad()
def split_background(new: nn.Module, background: nn.Module) -> None:
    """Let n new 1×1 classes and background share the probability that background had.

    Every new class takes background's weights, and all n + 1 of them its bias - log(n + 1), so the
    softmax of the other classes stays as it is. Source: Cermelli et al., MiB (CVPR 2020), its
    classifier initialisation.
    """
    bias = background.get_parameter("bias")
    bias.sub_(math.log(1 + len(new.get_parameter("bias"))))
    start_head(new, background)


class Heads(nn.ModuleList):
    """The heads of a plan in its order; the unknown one is not among them."""

    def __init__(self, channels: int, plan: HeadPlan):
        super().__init__(make_head(channels, size, plan.kind) for size in plan.sizes)
        self.plan = plan

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, channels, h, w] → logits [N, C, h, w] of all heads.

        A detached first head learns from the features without shaping them.
        """
        if self.plan.kind == "block":
            first = features.detach() if self.plan.detached_first else features
            logits = [head(features if n else first) for n, head in enumerate(self)]
        elif self.plan.detached_first:
            auxiliary, *classifiers = self
            logits = [
                F.conv2d(features.detach(), *_stacked([auxiliary])),
                F.conv2d(features, *_stacked(classifiers)),
            ]
        else:
            return F.conv2d(features, *_stacked(self))
        return torch.cat(logits, dim=1)

    def decomposed(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positive and negative part of each class logit, without bias and auxiliary head.

        Features are non-negative, so the sign of a contribution is the sign of its weight:
        pos + neg + bias = logit. Source: the paper's decomposition of logits for L_dkd.

        Returns:
            pos and neg, each [N, C - 1, h, w].

        Raises:
            ValueError: heads that are no 1×1 convolutions behind a detached first one.
        """
        if self.plan.kind != "conv1x1" or not self.plan.detached_first:
            raise ValueError(
                "'pos_neg' decomposes the logits of 1×1 heads behind a detached first one: the "
                f"plan needs kind 'conv1x1' and detached_first, but is {self.plan}."
            )
        _, *classifiers = self
        weight, _ = _stacked(classifiers)
        return F.conv2d(features, weight.clamp(min=0)), F.conv2d(features, weight.clamp(max=0))


def _stacked(heads: Iterable[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """1×1 heads as one: weight [C, channels, 1, 1] and bias [C].

    The weights are stacked as matrices: so their gradients lie in memory as the parameters do, and
    processes exchange them without a copy.
    """
    weights, biases = zip(
        *((head.get_parameter("weight"), head.get_parameter("bias")) for head in heads), strict=True
    )
    weight = torch.cat([weight.flatten(1) for weight in weights])
    return weight[..., None, None], torch.cat(biases)
