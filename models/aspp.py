"""Atrous spatial pyramid pooling of DeepLabV3, with a last 3×3 convolution. Built by the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.pixels import full_precision

# Dilations per output stride, the same distances in the image; the paper's for 16 and 8.
RATES = {32: (3, 6, 9), 16: (6, 12, 18), 8: (12, 24, 36)}


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

    def __init__(self, inputs: int, outputs: int, output_stride: int, *, last_conv: bool = True):
        """
        Args:
            inputs: channels of the backbone's features.
            outputs: channels of each branch and of the result.
            output_stride: a key of `RATES`.
            last_conv: end in the 3×3 convolution; False where each head begins with its own.
        """
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
        last = _conv_bn_relu(outputs, outputs, 3) if last_conv else []
        self.last_conv = nn.Sequential(*last)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, inputs, h, w] → [N, outputs, h, w], non-negative since it ends in a ReLU."""
        branches = [conv(features) for conv in self.convs]
        # In full precision: backwards it sums h·w gradients into one number, which half precision
        # leaves few digits.
        pooled = F.interpolate(
            full_precision(branches[-1]),
            size=features.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        branches[-1] = pooled.to(branches[0].dtype)
        return self.last_conv(self.project(torch.cat(branches, dim=1)))
