"""Frozen BatchNorm costs nothing: the convolution before it does its work.

With frozen statistics BatchNorm is y = scale · x + shift per channel, so conv and BatchNorm are one
convolution of weight `scale · w` and bias `shift`: no pass over the features, none of them kept for
the backward pass. Equal to the separate modules up to rounding.

Backbone and decoder are folded. Heads are a method's to read and to change at any time, and a fold
would keep what they were; nor is there much to save, for they are a small part of the work.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_model import BaseModel


class FoldedConv2d(nn.Conv2d):
    """A convolution that is trained, with the frozen BatchNorm after it; gradients reach `weight`.

    Attributes:
        scale: [outputs, 1, 1, 1]; in no state dict.
        shift: [outputs]; in no state dict.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] → [N, outputs, h, w], normalised."""
        return self._conv_forward(x, self.weight * self.scale, self.shift)


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A frozen BatchNorm that has been folded: it keeps its names and values for the state dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself."""
        return x


def fold_for_training(model: BaseModel) -> None:
    """Fold the frozen BatchNorm of a model that goes on training, in place.

    Names, parameters and what a state dict holds stay as they are; scale and shift are computed
    here and whenever weights are loaded.
    """
    for conv, norm, _, _ in _pairs(model):
        conv.__class__, norm.__class__ = FoldedConv2d, FoldedBatchNorm2d
    _compute(model)
    model.register_load_state_dict_post_hook(_compute)


def fold_for_inference(model: BaseModel) -> None:
    """Make each convolution and its BatchNorm one, in place, for a model that is only run.

    Computes the same bits as `fold_for_training`, but multiplies the weights once: they are no
    longer the model's own, and asking for them is an error.
    """
    for conv, norm, parent, name in _pairs(model):
        scale, shift = _affine(norm)
        conv.weight = nn.Parameter(conv.weight.detach() * scale, requires_grad=False)
        conv.bias = nn.Parameter(shift, requires_grad=False)
        setattr(parent, name, nn.Identity())
    model.rewritten = True
    model.register_state_dict_pre_hook(lambda *_: model.check_own_weights())


def _compute(model: BaseModel, *of_hook: object) -> None:
    for conv, norm, _, _ in _pairs(model):
        scale, shift = _affine(norm)
        conv.register_buffer("scale", scale, persistent=False)
        conv.register_buffer("shift", shift, persistent=False)


def _affine(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [channels, 1, 1, 1] and shift [channels] of a BatchNorm with frozen statistics."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    with torch.no_grad():
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return scale[:, None, None, None], norm.bias - mean * scale


def _pairs(model: BaseModel) -> list[tuple[nn.Conv2d, _BatchNorm, nn.Module, str]]:
    """Convolution and the BatchNorm registered right after it, the latter's parent and name there.

    So it is in torchvision's ResNets and in the ASPP; another arrangement is refused.
    """
    parts = model.parts()
    pairs: list[tuple[nn.Conv2d, _BatchNorm, nn.Module, str]] = []
    modules = [*parts.backbone.modules(), *parts.decoder.modules()]
    for parent in modules:
        for (_, conv), (name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                assert conv.bias is None, "a convolution in front of BatchNorm has no bias"
                assert conv.out_channels == norm.num_features
                pairs.append((conv, norm, parent, name))
    norms = sum(isinstance(module, _BatchNorm) for module in modules)
    assert len(pairs) == norms, "every BatchNorm must follow its convolution"
    return pairs
