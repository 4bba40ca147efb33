"""`DeepLabV3`: backbone, ASPP, heads. Built by `trainer/run.py`; knows no task and no method."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_model import OUTPUTS, BaseModel, HeadPlan, ModelOutput, Parts
from models.aspp import ASPP
from models.backbone import BACKBONES
from models.heads import Heads, make_head
from models.weights import check_imagenet, load_imagenet
from utils.errors import UserError, choose, listing

NORMS = ("bn_sync",)


class DeepLabV3(BaseModel):
    """The segmentation network of the paper: F_t = backbone and ASPP, then the heads.

    Its state-dict names (`backbone.…`, `aspp.…`, `cls.K.…`, `unknown.…`) are an interface: released
    weights load strictly. Where the heads are blocks, each has the last 3×3 convolution of its own,
    and the ASPP ends before it, as in SSUL.
    """

    def __init__(
        self,
        plan: HeadPlan,
        *,
        backbone: str = "resnet101",
        output_stride: int = 16,
        norm_act: str = "bn_sync",
        backbone_pretrained: bool | str = False,
        freeze_all_bn: bool = False,
        backbone_bn_momentum: float = 0.01,
        dropout: bool = True,
    ):
        """
        Args:
            plan: which heads.
            dropout: whether dropout is active in train mode.
            others: the keys of `arch.args`, as `utils/config_schema.py` explains them.

        Raises:
            UserError: an unknown backbone or norm, a stride that the backbone does not offer, or
                weights that cannot be had.
        """
        check_arch(backbone, output_stride, norm_act)
        super().__init__(frozen_bn=freeze_all_bn, dropout=dropout)
        spec = BACKBONES[backbone]
        width, block = spec.aspp_channels, plan.kind == "block"
        self.backbone = spec.build(output_stride)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = backbone_bn_momentum
        self.aspp = ASPP(spec.channels, width, output_stride, last_conv=not block)
        self.cls = Heads(width, plan)
        self.unknown = make_head(width, 1, plan.kind) if plan.unknown else None
        parts = self.parts()
        heads = (*parts.heads, *([parts.unknown] if parts.unknown else []))
        for part in (parts.decoder, *(heads if plan.kaiming_normal else ())):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
                elif isinstance(module, _BatchNorm):
                    nn.init.ones_(module.weight)
                    nn.init.zeros_(module.bias)
        if backbone_pretrained:
            load_imagenet(self.backbone, backbone, backbone_pretrained)
        self.freeze()

    def forward(self, images: torch.Tensor, wants: Collection[str] = ()) -> ModelOutput:
        assert OUTPUTS.issuperset(wants), f"outputs are {sorted(OUTPUTS)}, not {sorted(wants)}"
        maps, stages = self.backbone(images, "stages" in wants)
        features = self.aspp(maps)  # [N, 256, h, w]
        logits = self.cls(features)
        there = {"stages": stages, "backbone_features": maps, "features": features}
        outputs: dict[str, Any] = {name: there[name] for name in there if name in wants}
        if "pos_neg" in wants:
            outputs["pos"], outputs["neg"] = self.cls.decomposed(features)
        if "unknown" in wants:
            if self.unknown is None:
                raise ValueError("'unknown' is wanted, but the plan of the heads has no such head.")
            outputs["unknown"] = self.unknown(features)
        return ModelOutput(logits, **outputs)

    def parts(self) -> Parts:
        return Parts(self.backbone, self.aspp, tuple(self.cls), self.unknown)


def check_arch(
    backbone: str,
    output_stride: int,
    norm_act: str,
    backbone_pretrained: bool | str = False,
) -> None:
    """Judge the `arch.args` that a type cannot judge, before anything is allocated.

    Raises:
        UserError: an unknown backbone or norm, a stride that the backbone does not offer, or
            ImageNet weights that do not exist or are another backbone's.
    """
    choose("arch.args.backbone", backbone, BACKBONES)
    strides = BACKBONES[backbone].strides
    if output_stride not in strides:
        raise UserError(
            f"arch.args.output_stride is {output_stride}, which backbone '{backbone}' does not "
            f"offer; valid: {listing(map(str, strides))}."
        )
    if norm_act == "iabn_sync":
        raise UserError(
            "arch.args.norm_act 'iabn_sync' needs a compiled package that most machines cannot "
            "build and is not supported; use 'bn_sync'."
        )
    choose("arch.args.norm_act", norm_act, NORMS)
    if backbone_pretrained:
        check_imagenet(backbone, backbone_pretrained)


MODELS: dict[str, type[BaseModel]] = {"DeepLabV3": DeepLabV3}
