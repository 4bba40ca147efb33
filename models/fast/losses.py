"""The losses that methods call: what `models/loss.py` defines, in little time and memory.

Each equals its definition of the same name in value and gradient. Logits meet their targets at full
resolution part by part: where every class stands alone in chunks (`binary.py`), where they share a
softmax in bands (`softmax.py`). A loss without a fast way is called from `models/loss.py`.
"""

from __future__ import annotations

import torch

from models.fast.binary import OneHot, Scores, Targets, in_chunks
from models.fast.mean import pixel_mean
from models.fast.pod import local_pod as local_pod
from models.fast.softmax import CrossEntropy, Distillation, in_bands
from models.pixels import size_of


def mbce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_channel: int,
    pos_weight: float = 1.0,
    void_counts: bool = True,
) -> torch.Tensor:
    """As `models.loss.mbce`."""
    targets = OneHot(labels, first_channel, logits.shape[1], void_counts)
    return pixel_mean(in_chunks, logits, size_of(labels), targets, pos_weight)


def distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """As `models.loss.distillation`."""
    size = size or size_of(teacher)
    return pixel_mean(in_chunks, logits, size, Scores(teacher, size))


def auxiliary(logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """As `models.loss.auxiliary`."""
    return pixel_mean(in_chunks, logits, size or size_of(logits), Targets())


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old: int = 1,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `models.loss.cross_entropy`."""
    return pixel_mean(in_bands, logits, size_of(labels), CrossEntropy(labels, old, weight))


def soft_distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """As `models.loss.soft_distillation`."""
    size = size or size_of(teacher)
    return pixel_mean(in_bands, logits, size, Distillation(teacher, size))
