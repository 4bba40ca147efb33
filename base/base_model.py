"""What the loop and the methods know of a model: its heads by plan, named outputs, its parts.

Also a `train()` that respects frozen parts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

# What a forward pass returns on request, beside the logits.
OUTPUTS = frozenset({"pos_neg", "stages", "backbone_features", "features", "unknown"})
HEAD_KINDS = ("conv1x1", "block")
DROPOUT = (nn.Dropout, StochasticDepth)  # what draws random numbers in train mode


@dataclass(frozen=True)
class HeadPlan:
    """Which heads a model has.

    Attributes:
        sizes: outputs of each head, first to last.
        kind: "conv1x1", or "block": 3×3 convolution - BatchNorm - ReLU - 1×1 convolution.
        detached_first: the first head reads features without shaping them (DKD's auxiliary head).
        unknown: one more head of one output, apart from the others: `ModelOutput.unknown`.
        kaiming_normal: how the weights of convolutions start: drawn so, or as PyTorch draws them.
    """

    sizes: tuple[int, ...]
    kind: str = "conv1x1"
    detached_first: bool = False
    unknown: bool = False
    kaiming_normal: bool = True

    def __post_init__(self) -> None:
        assert self.kind in HEAD_KINDS, f"a head is one of {HEAD_KINDS}, not '{self.kind}'"

    def previous(self) -> HeadPlan:
        """The same without the newest head: the plan of the step before."""
        return replace(self, sizes=self.sizes[:-1])


class ModelOutput(NamedTuple):
    """What a forward pass returns, at feature resolution h×w; None what was not asked for.

    Attributes:
        logits: [N, C, h, w] of all heads, first to last.
        pos: [N, C', h, w] sum of positive weights times features, of the heads after the first.
        neg: [N, C', h, w] the same with the negative weights.
        stages: the maps of the four backbone stages, each [N, channels, h', w'], before the ReLU
            that ends the stage, where it ends in one.
        backbone_features: [N, channels, h, w], what the decoder reads: the backbone's features.
        features: [N, channels, h, w], what the heads read.
        unknown: [N, 1, h, w] logit of the unknown head.
    """

    logits: torch.Tensor
    pos: torch.Tensor | None = None
    neg: torch.Tensor | None = None
    stages: tuple[torch.Tensor, ...] | None = None
    backbone_features: torch.Tensor | None = None
    features: torch.Tensor | None = None
    unknown: torch.Tensor | None = None

    def require(self, name: str) -> torch.Tensor:
        """An output that was asked for.

        Raises:
            ValueError: it was not.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"'{name}' was not asked for.")
        return value

    def decomposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`pos` and `neg`, as `asked`."""
        return self.require("pos"), self.require("neg")


class Parts(NamedTuple):
    """A model cut into what parameter groups are made of; every parameter is in exactly one part.

    Attributes:
        backbone: what may start from ImageNet's weights.
        decoder: what makes the heads' features of the backbone's.
        heads: in the order of `HeadPlan.sizes`.
        unknown: the unknown head, if the plan has one.
    """

    backbone: nn.Module
    decoder: nn.Module
    heads: tuple[nn.Module, ...]
    unknown: nn.Module | None = None


class BaseModel(nn.Module):
    """A module some parts of which stay in eval mode whatever `train()` says."""

    def __init__(self, *, frozen_bn: bool = False, dropout: bool = True):
        """
        Args:
            frozen_bn: BatchNorm keeps its statistics, and its affine parameters are not trained.
            dropout: whether dropout, also that of whole branches, is active in train mode.
        """
        super().__init__()
        self.frozen_bn, self.dropout = frozen_bn, dropout
        self.rewritten = False  # whether the model can only be run (`models/folding.py`)

    @abstractmethod
    def forward(self, images: torch.Tensor, wants: Collection[str] = ()) -> ModelOutput:
        """
        Args:
            images: [N, 3, H, W] float32, normalised.
            wants: names out of `OUTPUTS`: what to return beside the logits.

        Returns:
            Outputs at feature resolution; whoever needs full size calls `upsample`.

        Raises:
            ValueError: an output that heads of this plan do not have.
        """

    @abstractmethod
    def parts(self) -> Parts:
        """The parts as they are now."""

    def freeze(self) -> None:
        """Take the affine parameters of frozen BatchNorm out of training; call once when built."""
        if self.frozen_bn:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(False)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; `RuntimeError` where the weights are rewritten."""
        self.check_own_weights()
        return super().named_parameters(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of any module, without their names, also where the weights are rewritten."""
        return (parameter for _, parameter in super().named_parameters(recurse=recurse))

    def check_own_weights(self) -> None:
        """Raise `RuntimeError` where the weights are rewritten, before anybody takes them."""
        if self.rewritten:
            raise RuntimeError(
                "the weights of this model are rewritten: BatchNorm is a part of its convolutions. "
                "The previous step's as they were loaded are StepContext.previous_state."
            )

    def channels_last(self) -> None:
        """Lay the weights out with the channels innermost, and with them all features.

        All but the heads, whose gradients come the other way round.
        """
        for part in self.parts()[:2]:
            part.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> BaseModel:
        """Switch to train mode, except what is frozen."""
        super().train(mode)
        for module in self.modules():
            if (self.frozen_bn and isinstance(module, _BatchNorm)) or (
                not self.dropout and isinstance(module, DROPOUT)
            ):
                module.eval()
        return self
