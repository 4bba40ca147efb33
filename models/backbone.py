"""Backbones: torchvision's bottleneck ResNets without classifier, and a tiny net of their blocks.

Built by `DeepLabV3`. State-dict names are torchvision's, without `fc`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import (
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    WeightsEnum,
    resnet,
)

TRAIN_MOMENTUM = 0.01  # of the backbone's BatchNorm statistics


@dataclass(frozen=True)
class BackboneSpec:
    """How a backbone is built.

    Attributes:
        build: takes the output stride.
        channels: of its features.
        aspp_channels: how wide the ASPP on top of it is.
        weights: ImageNet weights in torchvision, if any.
    """

    build: Callable[[int], nn.Module]
    channels: int
    aspp_channels: int
    weights: WeightsEnum | None


class Backbone(nn.Module):
    """The stages of a ResNet; takes images [N, 3, H, W], returns features [N, channels, h, w]."""

    def __init__(self, net: resnet.ResNet):
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = TRAIN_MOMENTUM

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features at the output stride."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class _TinyResNet(resnet.ResNet):
    """One narrow bottleneck block per stage, for CPU demos and tests."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def _dilation(output_stride: int) -> list[bool]:
    return [False, output_stride == 8, True]


def _resnet(layers: list[int]) -> Callable[[int], nn.Module]:
    def build(output_stride: int) -> nn.Module:
        return Backbone(
            resnet.ResNet(
                resnet.Bottleneck, layers, replace_stride_with_dilation=_dilation(output_stride)
            )
        )

    return build


def _tiny(output_stride: int) -> nn.Module:
    return Backbone(
        _TinyResNet(
            resnet.Bottleneck,
            [1, 1, 1, 1],
            replace_stride_with_dilation=_dilation(output_stride),
        )
    )


BACKBONES: dict[str, BackboneSpec] = {
    "resnet50": BackboneSpec(_resnet([3, 4, 6, 3]), 2048, 256, ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": BackboneSpec(_resnet([3, 4, 23, 3]), 2048, 256, ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": BackboneSpec(_resnet([3, 8, 36, 3]), 2048, 256, ResNet152_Weights.IMAGENET1K_V1),
    "tiny": BackboneSpec(_tiny, 512, 64, None),
}
