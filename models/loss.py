"""The loss terms as their papers define them, in plain tensor operations.

* Sigmoid: *Decomposed Knowledge Distillation for Class-Incremental Semantic Segmentation* (DKD,
  NeurIPS 2022, arXiv 2210.05941). A binary cross-entropy averaged over N, H and W, one value per
  class; the trainer sums them over classes.
* Softmax: *Modeling the Background for Incremental Learning in Semantic Segmentation* (MiB, CVPR
  2020, arXiv 2002.00718); plain cross-entropy and plain distillation are special cases.
* Features: Local POD of *PLOP: Learning without Forgetting for Continual Semantic Segmentation*
  (CVPR 2021, arXiv 2011.11390).

Written to be read and compared with: logits come at feature resolution h×w and every class of them
is upsampled to full resolution H×W. Methods call the functions of the same names in
`models/fast/losses.py`, which give the same values and gradients without holding that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from base.batch import void_of
from models.pixels import full_precision, size_of, upsample


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    pos_weight: float | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every class against the rest: mean over pixels of -[p y log σ(x) + (1 - y) log(1 - σ(x))].

    Args:
        logits: x, [N, C, H, W].
        targets: y between 0 and 1, [N, C, H, W].
        pos_weight: p, weight of the positive part; without it equal scores have a gradient of
            exactly zero, with a weight of 1 only up to rounding.
        counted: [N, 1, H, W], 0 where the loss is zero whatever the logits, else 1.

    Returns:
        [C].
    """
    weight = None if pos_weight is None else logits.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weight)
    return (loss if counted is None else loss * counted).mean(dim=(0, 2, 3))


def mbce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_channel: int,
    pos_weight: float = 1.0,
    void_counts: bool = True,
) -> torch.Tensor:
    """L_mbce: target 1 where the label names the class, else 0.

    Reference quirk of DKD: background and void (255) are targets of zero for every class; no pixel
    is masked out. For SSUL and LwF-MC void is masked out, but still counted in the mean.

    Args:
        logits: [N, C, h, w] of C consecutive channels.
        labels: [N, H, W] uint8 channels.
        first_channel: label that belongs to `logits[:, 0]`.
        pos_weight: weight of the pixels of the class itself.
        void_counts: whether void is a target of zero; else the loss there is zero.

    Returns:
        [C].
    """
    end, void = first_channel + logits.shape[1], void_of(labels)
    assert end <= void, "the largest label is void"
    channels = torch.arange(first_channel, end, device=labels.device)
    logits = upsample(logits, size_of(labels))  # [N, C, H, W]
    targets = labels[:, None] == channels[:, None, None]  # [N, C, H, W]
    counted = None if void_counts else (labels != void)[:, None].to(logits.dtype)
    return binary_cross_entropy(logits, targets.to(logits.dtype), pos_weight, counted)


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


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old: int = 1,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_ce of the softmax; with several old channels MiB's unbiased one.

    The labels of a step call old classes background, so there the probabilities of all old channels
    are summed: -log Σ_{c < old} p_c, and -log p_y elsewhere.

    Reference quirk: the mean is over all pixels, though void ones contribute nothing.

    Args:
        logits: [N, C, h, w], background first.
        labels: [N, H, W] channels; any below `old` means one of those.
        old: how many channels labels do not tell apart, background among them; 1: plain.
        weight: [N] of the images; 1 each when None.

    Returns:
        [1].
    """
    logits = upsample(logits, size_of(labels))  # [N, C, H, W]
    void = labels == void_of(labels)
    hidden = logits[:, :old].logsumexp(1, keepdim=True)
    log_p = torch.cat([hidden, logits[:, old:]], 1) - logits.logsumexp(1, keepdim=True)
    target = (labels.long() - old + 1).clamp(min=0).masked_fill(void, 0)
    loss = -log_p.gather(1, target[:, None])[:, 0].masked_fill(void, 0)  # [N, H, W]
    if weight is not None:
        loss = loss * weight[:, None, None]
    return loss.mean()[None]


def soft_distillation(
    logits: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """L_kd of the softmax, MiB's unbiased one: the teacher's background may be any new class.

    -1/K Σ_{c < K} q_c log p_c with the teacher's probabilities q over its K channels and p_0 the
    sum of the student's over background and the channels that the teacher lacks. Where both have
    the same channels it is LwF's. Every pixel counts, void too.

    Args:
        logits: [N, C, h, w] of the student, background first.
        teacher: [N, K, h, w] logits of the teacher's channels; they carry no gradient.
        size: H and W, where they are compared; at their own h and w when None.

    Returns:
        [1].
    """
    size, old = size or size_of(teacher), teacher.shape[1]
    q = upsample(teacher.detach(), size).softmax(1)  # [N, K, H, W]
    logits = upsample(logits, size)  # [N, C, H, W]
    background = torch.cat([logits[:, :1], logits[:, old:]], 1).logsumexp(1, keepdim=True)
    log_p = torch.cat([background, logits[:, 1:old]], 1) - logits.logsumexp(1, keepdim=True)
    return -(q * log_p).sum(1).mean()[None] / old


def strips(maps: torch.Tensor, scales: tuple[int, ...] = (1, 2, 4)) -> torch.Tensor:
    """Φ of PLOP: a map's squares, averaged over the rows and over the columns of windows.

    At scale s the map is cut into s×s windows of H // s by W // s; a remainder is dropped.

    Args:
        maps: [N, C, H, W].
        scales: windows per side.

    Returns:
        [N, L]; of a square map whose side W divides by 4, L = 14 C W.
    """
    squares, parts = maps.square(), []
    for s in scales:
        height, width = maps.shape[-2] // s, maps.shape[-1] // s
        for i in range(s):
            for j in range(s):
                window = squares[..., i * height :, j * width :][..., :height, :width]
                parts += [window.mean(3).flatten(1), window.mean(2).flatten(1)]
    return torch.cat(parts, dim=1)


def local_pod(maps: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Local POD of one map: mean over images of ‖Φ(teacher) - Φ(student)‖₂, not squared.

    Args:
        maps: [N, C, H, W] of the student, H and W at least 4.
        teacher: the same of the teacher; they carry no gradient.

    Returns:
        [1].
    """
    maps, teacher = full_precision(maps), full_precision(teacher.detach())  # squares overflow
    return torch.linalg.vector_norm(strips(teacher) - strips(maps), dim=1).mean()[None]
