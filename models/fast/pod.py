"""Local POD without a loop over windows.

Pooling is linear and a norm does not depend on the order of its entries. So what the definition
subtracts are pooled values of one map, d = teacher² - student²; and all windows of a row, or of a
column, are one product with a matrix.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from models.pixels import exact_products, full_precision, size_of

SCALES = (1, 2, 4)  # windows per side, 7 along a side in all


def local_pod(maps: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """As `models.loss.local_pod`: [N, C, H, W] of the student and of the teacher → [1]."""
    if not torch.is_grad_enabled():
        maps = maps.detach()
    with torch.autocast(maps.device.type, enabled=False):
        return PodDistance.apply(maps, teacher.detach())


class PodDistance(torch.autograd.Function):
    """Mean over images of ‖v‖, v pooled from d; only v and the student's map are kept.

    With a = v pooled back, d ‖v‖ / d maps = -2 maps a / ‖v‖, and 0 where v is 0.
    """

    @staticmethod
    @exact_products()
    def forward(ctx, maps, teacher):
        kind = full_precision(maps[:0])
        (height, rows_kept), (width, columns_kept) = (windows(kind, s) for s in size_of(maps))
        norms, pooled = [], []
        for student, target in zip(maps, teacher, strict=True):
            student, target = full_precision(student), full_precision(target)
            d = ((target - student) * (target + student)).permute(1, 2, 0).contiguous()  # [H, W, C]
            along = (width.t() @ d).mul_(rows_kept[..., None])  # [H, 7, C]
            down = (height.t() @ d.flatten(1)).view(-1, *d.shape[1:])  # [7, W, C]
            down.mul_(columns_kept.t()[..., None])
            norms.append((along.square().sum() + down.square().sum()).sqrt())
            pooled += [along, down]
        norm = torch.stack(norms)  # [N]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(maps, norm, height, width, *pooled)
        return norm.mean()[None]

    @staticmethod
    @once_differentiable
    @exact_products()
    def backward(ctx, weight):
        """[1] → [N, C, H, W]."""
        maps, norm, height, width, *pooled = ctx.saved_tensors
        factors = torch.where(norm > 0, -2 * weight / (len(maps) * norm), 0)
        gradient = torch.empty_like(maps)
        with torch.autocast(maps.device.type, enabled=False):
            for image, factor in enumerate(factors):
                along, down = pooled[2 * image : 2 * image + 2]
                back = (width @ along).flatten(1)  # [H, W·C]
                back.addmm_(height, down.flatten(1))
                back = back.view(len(height), len(width), -1).permute(2, 0, 1)
                gradient[image] = back.mul_(factor).mul_(maps[image])
        return gradient, None


def windows(like: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a side: weights that pool it, [side, 7]; 0 where a scale drops a place, [side, 7]."""
    place = torch.arange(side, device=like.device)[:, None]
    weights, kept = [], []
    for s in SCALES:
        length = side // s
        window = torch.arange(s, device=like.device)
        weights.append((place // length == window).to(like.dtype) / length)
        kept.append((place < s * length).expand(-1, s))
    return torch.cat(weights, 1), torch.cat(kept, 1).to(like.dtype)
