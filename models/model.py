"""`DeepLabV3`: backbone, ASPP, heads. Built by `trainer/run.py`; knows no task and no method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_model import BaseModel, ModelOutput
from models.aspp import ASPP
from models.backbone import BACKBONES
from models.heads import Heads
from models.weights import load_imagenet
from utils.misc import UserError, choose

NORMS = ("bn_sync",)


class DeepLabV3(BaseModel):
    """The segmentation network of the paper: F_t = backbone and ASPP, then the heads.

    Its state-dict names (`backbone.…`, `aspp.…`, `cls.K.…`) are an interface: released weights load
    strictly.
    """

    def __init__(
        self,
        head_sizes: Sequence[int],
        *,
        backbone: str = "resnet101",
        output_stride: int = 16,
        norm_act: str = "bn_sync",
        backbone_pretrained: bool | str = False,
        freeze_all_bn: bool = False,
        dropout: bool = True,
    ):
        """
        Args:
            head_sizes: outputs per head, [1, classes of step 0, …].
            backbone: name out of `BACKBONES`.
            output_stride: 8 or 16.
            norm_act: "bn_sync" (BatchNorm + ReLU, synchronised over GPUs by the trainer).
            backbone_pretrained: ImageNet weights: True, False or a local file.
            freeze_all_bn: keep statistics and affine parameters of every BatchNorm.
            dropout: whether dropout is active in train mode.

        Raises:
            UserError: an unknown backbone or norm, or weights that cannot be had.
        """
        check_arch(backbone, norm_act, backbone_pretrained)
        super().__init__(frozen_bn=freeze_all_bn, dropout=dropout)
        spec = BACKBONES[backbone]
        self.backbone = spec.build(output_stride)
        self.aspp = ASPP(spec.channels, spec.aspp_channels, output_stride)
        self.cls = Heads(spec.aspp_channels, head_sizes)
        for module in (*self.aspp.modules(), *self.cls.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, _BatchNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if backbone_pretrained:
            load_imagenet(self.backbone, spec.weights, backbone_pretrained)
        self.freeze()

    def forward(self, images: torch.Tensor, decompose: bool = False) -> ModelOutput:
        """
        Args:
            images: [N, 3, H, W] float32, normalised.
            decompose: also return the decomposed logits.

        Returns:
            Outputs at feature resolution; whoever needs full size calls `upsample`.
        """
        features = self.aspp(self.backbone(images))  # [N, 256, h, w]
        logits = self.cls(features)
        return ModelOutput(logits, *(self.cls.decomposed(features) if decompose else ()))

    def channels_last(self) -> None:
        """All but the heads, whose gradients come the other way round."""
        for part in (self.backbone, self.aspp):
            part.to(memory_format=torch.channels_last)


def check_arch(backbone: str, norm_act: str, backbone_pretrained: bool | str) -> None:
    """Judge the `arch.args` that a type cannot judge, before anything is allocated.

    Raises:
        UserError: an unknown backbone or norm, or a backbone without ImageNet weights.
    """
    choose("arch.args.backbone", backbone, BACKBONES)
    if norm_act == "iabn_sync":
        raise UserError(
            "arch.args.norm_act 'iabn_sync' needs a compiled package that most machines cannot "
            "build and is not supported; use 'bn_sync'."
        )
    choose("arch.args.norm_act", norm_act, NORMS)
    if backbone_pretrained is True and BACKBONES[backbone].weights is None:
        raise UserError(
            f"there are no ImageNet weights for arch.args.backbone '{backbone}'; set "
            "arch.args.backbone_pretrained to false or to the path of a weight file."
        )
    if isinstance(backbone_pretrained, str) and not Path(backbone_pretrained).is_file():
        raise UserError(f"arch.args.backbone_pretrained: there is no file {backbone_pretrained}.")


MODELS: dict[str, type[BaseModel]] = {"DeepLabV3": DeepLabV3}
