"""The loss terms as pure functions: per-class binary cross-entropies from logits.

Each returns one value per class, averaged over N, H and W; the trainer sums them over classes. The
terms and their names are those of *Decomposed Knowledge Distillation for Class-Incremental Semantic
Segmentation* (NeurIPS 2022). Called by the methods; no loop over classes or pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BATCH_AND_PIXELS = (0, 2, 3)


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, in full precision: [N, C, h, w] → [N, C, H, W]."""
    return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float32 (float64 stays) whatever the mixed precision of the network."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mbce(
    logits: torch.Tensor, labels: torch.Tensor, first_channel: int, pos_weight: float = 1.0
) -> torch.Tensor:
    """L_mbce: every class against the rest.

    Reference quirk: background and void (255) are targets of zero for every class; no pixel is
    masked out.

    Args:
        logits: [N, C, H, W] of C consecutive channels.
        labels: [N, H, W] uint8 channels.
        first_channel: label that belongs to `logits[:, 0]`.
        pos_weight: weight of the pixels of the class itself.

    Returns:
        [C].
    """
    classes = logits.shape[1]
    channels = torch.arange(first_channel, first_channel + classes, device=labels.device)
    targets = (labels[:, None] == channels.view(1, classes, 1, 1)).to(logits.dtype)  # [N, C, H, W]
    weight = logits.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    return loss.mean(BATCH_AND_PIXELS)


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """L_kd on logits, L_dkd on their positive or negative part: imitate the teacher's scores.

    Args:
        logits: [N, C, H, W] of the student.
        teacher: [N, C, H, W] logits of the teacher; they carry no gradient.

    Returns:
        [C].
    """
    targets = full_precision(teacher.detach()).sigmoid()
    loss = F.binary_cross_entropy_with_logits(full_precision(logits), targets, reduction="none")
    return loss.mean(BATCH_AND_PIXELS)


def auxiliary(logits: torch.Tensor) -> torch.Tensor:
    """L_ac: the auxiliary head learns "none of these", target 0, on every pixel.

    Args:
        logits: [N, 1, H, W].

    Returns:
        [1]. Cross-entropy against zero is softplus.
    """
    return F.softplus(logits).mean(BATCH_AND_PIXELS)
