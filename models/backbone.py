"""Backbones by name: torchvision's bottleneck ResNets and Swin transformers without classifier.

Built by `DeepLabV3`. A backbone is one entry of `BACKBONES` and a module
`forward(images [N, 3, H, W], with_stages) -> (features [N, channels, h, w], stages)` with h and w
the image's sides over the output stride, rounded up; `stages` are the maps of its four stages, or
empty when not asked for. State-dict names are torchvision's, without the classifier's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum, resnet
from torchvision.models.swin_transformer import SwinTransformer

Features = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class BackboneSpec:
    """How a backbone is built and what its weight file holds.

    Attributes:
        build: takes the output stride.
        channels: of its features.
        aspp_channels: how wide the ASPP on top of it is.
        weights: ImageNet weights in torchvision, if any.
        strides: the output strides that it offers.
        dropped: how names of a weight file begin that are the classifier's and left out.
        may_miss: how names end that a weight file need not have.
        stages: whether it has maps of four stages to show.
    """

    build: Callable[[int], nn.Module]
    channels: int
    aspp_channels: int = 256
    weights: WeightsEnum | None = None
    strides: tuple[int, ...] = (8, 16)
    dropped: tuple[str, ...] = ()
    may_miss: tuple[str, ...] = ()
    stages: bool = True


class Backbone(nn.Module):
    """The stages of a ResNet, the last one or two dilated instead of strided.

    A stage's map is the sum of its last block before the ReLU, as PLOP's attention maps are.
    """

    def __init__(self, net: resnet.ResNet):
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4

    def forward(self, images: torch.Tensor, with_stages: bool = False) -> Features:
        """Features at the output stride; the stages lie at strides 4, 8 and on."""
        x, stages = self.maxpool(self.relu(self.bn1(self.conv1(images)))), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            *blocks, last = layer.children()
            assert isinstance(last, resnet.Bottleneck)
            for block in blocks:
                x = block(x)
            x = _without_last_relu(last, x)
            if with_stages:
                stages.append(x)
                x = F.relu(x)  # torchvision's works in place and would overwrite the stage's map
            else:
                x = last.relu(x)
        return x, tuple(stages)


def _without_last_relu(block: resnet.Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """What `resnet.Bottleneck.forward` does, operation by operation, up to its last ReLU."""
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    out = block.bn3(block.conv3(out))
    out += x if block.downsample is None else block.downsample(x)
    return out


class _TinyResNet(resnet.ResNet):
    """One narrow bottleneck block per stage, for CPU demos and tests."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def _resnet(
    layers: list[int], net: type[resnet.ResNet] = resnet.ResNet
) -> Callable[[int], nn.Module]:
    def build(output_stride: int) -> nn.Module:
        dilated = [False, output_stride == 8, True]
        return Backbone(net(resnet.Bottleneck, layers, replace_stride_with_dilation=dilated))

    return build


class Swin(nn.Module):
    """torchvision's Swin transformer at its own strides: 4, 8, 16 and, for the features, 32.

    Its last stage cannot be dilated as a ResNet's can: patch merging makes one token of four by
    weights that know where each of them lies, and the last stage's windows were trained on that
    grid. Features enlarged to stride 16 would cost the ASPP and the heads four times as much and
    show nothing new, so only stride 32 is offered. Class-incremental segmentation does the same:
    CoinSeg (Zhang et al., ICCV 2023) puts the head of DeepLabV3 on the normalised output of Swin's
    last stage.

    A stage's map is the output of its last block: there is no ReLU, and no LayerNorm yet.
    """

    def __init__(self, net: SwinTransformer):
        super().__init__()
        self.features, self.norm = net.features, net.norm
        self.patch: tuple[int, int] = net.features[0][0].stride

    def forward(self, images: torch.Tensor, with_stages: bool = False) -> Features:
        """Features at stride 32; sides that do not divide are padded with zeros, the mean colour.

        Source: the padding, Liu et al., Swin Transformer, the published code for segmentation;
        torchvision's patches would leave out the last rows and columns.
        """
        (height, width), (down, right) = images.shape[-2:], self.patch
        x, stages = F.pad(images, (0, -width % right, 0, -height % down)), []
        embedding, *rest = self.features
        x = embedding(x)  # [N, h, w, channels] from here on
        for number, part in enumerate(rest):  # stage, merging, stage, …
            x = part(x)
            if with_stages and number % 2 == 0:
                stages.append(x.permute(0, 3, 1, 2))
        # In memory as the images lie, so that the ASPP's gradients lie as its parameters do.
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self.norm(x).permute(0, 3, 1, 2).contiguous(memory_format=layout), tuple(stages)


def _resnet_spec(layers: list[int], weights: WeightsEnum) -> BackboneSpec:
    # torchvision still ships files from before torch 0.4.1, which do not count batches.
    counters = ("num_batches_tracked",)
    build = _resnet(layers)
    return BackboneSpec(build, 2048, weights=weights, dropped=("fc.",), may_miss=counters)


def _swin_spec(
    make: Callable[[], SwinTransformer], channels: int, weights: WeightsEnum
) -> BackboneSpec:
    def build(output_stride: int) -> nn.Module:
        return Swin(make())

    return BackboneSpec(build, channels, weights=weights, strides=(32,), dropped=("head.",))


BACKBONES: dict[str, BackboneSpec] = {
    "resnet50": _resnet_spec([3, 4, 6, 3], models.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": _resnet_spec([3, 4, 23, 3], models.ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": _resnet_spec([3, 8, 36, 3], models.ResNet152_Weights.IMAGENET1K_V1),
    "swin_t": _swin_spec(models.swin_t, 768, models.Swin_T_Weights.IMAGENET1K_V1),
    "swin_b": _swin_spec(models.swin_b, 1024, models.Swin_B_Weights.IMAGENET1K_V1),
    "tiny": BackboneSpec(_resnet([1, 1, 1, 1], _TinyResNet), 512, 64),
}
