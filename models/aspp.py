"""Atrous spatial pyramid pooling of DeepLabV3, with a last 3×3 convolution. Built by the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # dilations per output stride


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Dropout(nn.Dropout):
    """Dropout that drops the same values whatever the layout in memory, along which torch draws."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, channels, h, w] → the same shape."""
        return super().forward(features.contiguous() if self.training else features)


class ASPP(nn.Module):
    """Five parallel branches, concatenated and projected.

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation (DeepLabV3).
    """

    def __init__(self, inputs: int, outputs: int, output_stride: int):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Sequential(*_conv_bn_relu(inputs, outputs, 1)),
                *(
                    nn.Sequential(*_conv_bn_relu(inputs, outputs, 3, rate))
                    for rate in RATES[output_stride]
                ),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(inputs, outputs, 1)),
            ]
        )
        self.project = nn.Sequential(*_conv_bn_relu(5 * outputs, outputs, 1), Dropout(0.1))
        self.last_conv = nn.Sequential(*_conv_bn_relu(outputs, outputs, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, inputs, h, w] → [N, outputs, h, w], non-negative since it ends in a ReLU."""
        branches = [conv(features) for conv in self.convs]
        branches[-1] = F.interpolate(
            branches[-1], size=features.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.last_conv(self.project(torch.cat(branches, dim=1)))
