"""The loss terms as their paper defines them, in plain tensor operations.

*Decomposed Knowledge Distillation for Class-Incremental Semantic Segmentation* (NeurIPS 2022, arXiv
2210.05941). Each term is a binary cross-entropy averaged over N, H and W, one value per class; the
trainer sums them over classes.

Written to be read and compared with: logits come at feature resolution h×w and every class of them
is upsampled to full resolution H×W. Methods call the functions of the same names in
`models/fast_loss.py`, which give the same values and gradients without holding that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.upsampling import size_of, upsample


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, pos_weight: float | None = None
) -> torch.Tensor:
    """Every class against the rest: mean over pixels of -[p y log σ(x) + (1 - y) log(1 - σ(x))].

    Args:
        logits: x, [N, C, H, W].
        targets: y between 0 and 1, [N, C, H, W].
        pos_weight: p, weight of the positive part; without it equal scores have a gradient of
            exactly zero, with a weight of 1 only up to rounding.

    Returns:
        [C].
    """
    weight = None if pos_weight is None else logits.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weight)
    return loss.mean(dim=(0, 2, 3))


def mbce(
    logits: torch.Tensor, labels: torch.Tensor, first_channel: int, pos_weight: float = 1.0
) -> torch.Tensor:
    """L_mbce: target 1 where the label names the class, else 0.

    Reference quirk: background and void (255) are targets of zero for every class; no pixel is
    masked out.

    Args:
        logits: [N, C, h, w] of C consecutive channels.
        labels: [N, H, W] uint8 channels.
        first_channel: label that belongs to `logits[:, 0]`.
        pos_weight: weight of the pixels of the class itself.

    Returns:
        [C].
    """
    end = first_channel + logits.shape[1]
    assert end <= torch.iinfo(labels.dtype).max, "the largest label is void"
    channels = torch.arange(first_channel, end, device=labels.device)
    logits = upsample(logits, size_of(labels))  # [N, C, H, W]
    targets = labels[:, None] == channels[:, None, None]  # [N, C, H, W]
    return binary_cross_entropy(logits, targets.to(logits.dtype), pos_weight)


def distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """L_kd on logits, L_dkd on their positive or negative part: imitate the teacher's scores.

    Args:
        logits: [N, C, h, w] of the student.
        teacher: [N, C, h, w] logits of the teacher; they carry no gradient.
        size: H and W, where they are compared; at their own h and w when None.

    Returns:
        [C].
    """
    size = size or size_of(teacher)
    targets = upsample(teacher.detach(), size).sigmoid()  # [N, C, H, W]
    return binary_cross_entropy(upsample(logits, size), targets)


def auxiliary(logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """L_ac: the auxiliary head learns "none of these", target 0, on every pixel.

    Args:
        logits: [N, 1, h, w].
        size: H and W, where every pixel counts once; h and w when None.

    Returns:
        [1].
    """
    logits = upsample(logits, size or size_of(logits))  # [N, 1, H, W]
    return binary_cross_entropy(logits, torch.zeros_like(logits))
