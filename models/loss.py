"""The loss terms as pure functions: per-class binary cross-entropies from logits.

Each returns one value per class, averaged over N, H and W; the trainer sums them over classes. The
terms and their names are those of *Decomposed Knowledge Distillation for Class-Incremental Semantic
Segmentation* (NeurIPS 2022). Called by the methods; no loop over classes or pixels.

Logits come at feature resolution h×w and meet their targets at full resolution H×W, where no tensor
of all classes ever exists: upsampling, target, cross-entropy, mean and gradient go over chunks of a
few megabytes, and what outlives a chunk has h×w.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes of a chunk at full resolution. On a CPU the three that are worked on share the cache;
# elsewhere they are large enough that the device does not wait for the next call.
CPU_CHUNK, DEVICE_CHUNK = 4 * 2**20, 64 * 2**20

Chunk = tuple[slice, slice]  # images, classes: `logits[chunk]` is [n, c, h, w]
Targets = Callable[[Chunk, torch.Tensor], object]  # writes those of a chunk to [H, n, c, W]


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, in full precision: [N, C, h, w] → [N, C, H, W]."""
    return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float32 (float64 stays) whatever the mixed precision of the network."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def chunks(logits: torch.Tensor, size: tuple[int, int]) -> list[Chunk]:
    """Cut [N, C, h, w] into parts that are small when upsampled to `size`.

    The first is the largest; those of an image come in the order of the classes.
    """
    budget = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    planes = max(1, budget // (math.prod(size) * full_precision(logits[:0]).itemsize))
    images = min(planes, len(logits))
    classes = planes // images
    return [
        (slice(image, image + images), slice(first, first + classes))
        for image in range(0, len(logits), images)
        for first in range(0, logits.shape[1], classes)
    ]


class Bilinear:
    """`upsample` of chunks and its adjoint, as products with matrices.

    Bilinear upsampling is linear and separable, x → U_h x U_wᵀ, and no row of U_h or U_w has more
    than two weights. The pattern of the weights repeats gcd(h, H) times from the first row to the
    last, so U_h acts as that many blocks, each of which reads its own h / gcd(h, H) rows of x and a
    neighbour on either side: 3 rows make 16 at output stride 16. As exact as the products are, so
    not under TF32, which PyTorch leaves off unless asked.
    """

    def __init__(self, logits: torch.Tensor, size: tuple[int, int]):
        """
        Args:
            logits: [N, C, h, w] in full precision.
            size: H and W.
        """
        (h, w), (H, W) = logits.shape[-2:], size
        self.size = size
        self.blocks = math.gcd(h, H)
        self.own = h // self.blocks  # rows of x that belong to a block
        self.across = self._weights(logits, w, W).t()  # U_wᵀ: [w, W]
        banded = F.pad(self._weights(logits, h, H), (1, 1))  # U_h: [H, 1 + h + 1]
        block = (self.blocks, H // self.blocks, self.own + 2)
        along_diagonal = banded.stride(0) * block[1] + self.own
        self.down = banded.as_strided(block, (along_diagonal, *banded.stride()))

    @staticmethod
    def _weights(logits: torch.Tensor, before: int, after: int) -> torch.Tensor:
        """[after, before]: the identity upsampled, so to the bit what `upsample` multiplies by."""
        identity = torch.eye(before, dtype=logits.dtype, device=logits.device)
        return upsample(identity[None, None], (after, before))[0, 0]

    def up(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[n, c, h, w] → out: [H, n, c, W]. Rows lead, which makes the blocks views."""
        rows = F.pad(x.permute(2, 0, 1, 3), (0, 0, 0, 0, 0, 0, 1, 1))  # [1 + h + 1, n, c, w]
        rows = (rows.flatten(0, 2) @ self.across).view(len(rows), -1)  # [1 + h + 1, n·c·W]
        rows = rows.unfold(0, self.own + 2, self.own).transpose(1, 2)  # they overlap by two
        torch.bmm(self.down, rows, out=out.view(*self.down.shape[:2], -1))
        return out

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """[H, n, c, W] → [n, c, h, w]: from the gradient behind `up` to the one before it."""
        _, n, c, W = x.shape
        parts = torch.bmm(self.down.transpose(1, 2), x.view(*self.down.shape[:2], -1))
        parts = (parts.view(-1, W) @ self.across.t()).view(self.blocks, self.own + 2, n, c, -1)
        rows = parts[:, 1:-1]  # [blocks, own, n, c, w]; what overlaps goes to its owner
        rows[:-1, -1] += parts[1:, 0]
        rows[1:, 0] += parts[:-1, -1]
        return rows.flatten(0, 1).permute(1, 2, 0, 3)


class BinaryCrossEntropy(torch.autograd.Function):
    """Mean binary cross-entropy of upsampled logits; the forward pass forms the gradient as well.

    With logit x, target y, weight of positives p, softplus s(x) = log(1 + eˣ) and sigmoid σ:

        loss = (1 - y) s(x) + p y s(-x) = (1 + (p - 1) y) s(x) - p y x
        d loss / d x = (1 + (p - 1) y) σ(x) - p y
    """

    @staticmethod
    def forward(ctx, logits, size, targets, pos_weight):
        """[N, C, h, w] → [C]."""
        inputs = full_precision(logits)
        bilinear = Bilinear(inputs, size)
        parts = chunks(inputs, size)
        total = inputs.new_zeros(inputs.shape[1])
        gradient = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        work = inputs.new_empty(3, inputs[parts[0]].shape[:2].numel() * math.prod(size))
        for part in parts:
            n, c = inputs[part].shape[:2]
            shape = (size[0], n, c, size[1])
            x, y, loss = work[:, : math.prod(shape)].view(3, *shape)
            bilinear.up(inputs[part], out=x)
            targets(part, y)
            F.softplus(x, out=loss)
            if pos_weight != 1:
                loss.addcmul_(loss, y, value=pos_weight - 1)
            loss.addcmul_(x, y, value=-pos_weight)  # nearly cancels: per pixel, not in sums
            total[part[1]] += loss.sum(3).sum((0, 1))
            if gradient is not None:
                slope = x.sigmoid_()
                if pos_weight != 1:
                    slope.addcmul_(slope, y, value=pos_weight - 1)
                gradient[part] = bilinear.adjoint(slope.sub_(y, alpha=pos_weight))
        ctx.dtype, ctx.count = logits.dtype, len(logits) * math.prod(size)
        ctx.save_for_backward(gradient)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        """[C] → [N, C, h, w]. In half precision only now, after a loss scale has lifted it."""
        (gradient,) = ctx.saved_tensors
        gradient = gradient * (weight / ctx.count)[:, None, None]
        return gradient.to(ctx.dtype), None, None, None


def binary_cross_entropy(
    logits: torch.Tensor, size: tuple[int, int], targets: Targets, pos_weight: float = 1.0
) -> torch.Tensor:
    """Every class against the rest: mean over N, H and W of the binary cross-entropy.

    Args:
        logits: [N, C, h, w].
        size: H and W, to which the logits are upsampled.
        targets: writes the targets of a chunk; they carry no gradient.
        pos_weight: weight of the positive part.

    Returns:
        [C].
    """
    if not torch.is_grad_enabled():
        logits = logits.detach()
    with torch.autocast(logits.device.type, enabled=False):
        return BinaryCrossEntropy.apply(logits, size, targets, pos_weight)


def mbce(
    logits: torch.Tensor, labels: torch.Tensor, first_channel: int, pos_weight: float = 1.0
) -> torch.Tensor:
    """L_mbce: every class against the rest.

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
    channels = torch.arange(first_channel, end, device=labels.device).to(labels.dtype)[:, None]
    rows = labels.transpose(0, 1)[:, :, None]  # [H, N, 1, W]

    def one_hot(chunk: Chunk, out: torch.Tensor) -> None:
        images, classes = chunk
        torch.eq(rows[:, images], channels[classes], out=out)  # straight to floats

    return binary_cross_entropy(logits, labels.shape[-2:], one_hot, pos_weight)


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
    teacher = full_precision(teacher.detach())
    bilinear = Bilinear(teacher, size or teacher.shape[-2:])

    def scores(chunk: Chunk, out: torch.Tensor) -> None:
        bilinear.up(teacher[chunk], out).sigmoid_()

    return binary_cross_entropy(logits, bilinear.size, scores)


def auxiliary(logits: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """L_ac: the auxiliary head learns "none of these", target 0, on every pixel.

    Args:
        logits: [N, 1, h, w].
        size: H and W, where every pixel counts once; h and w when None.

    Returns:
        [1].
    """
    return binary_cross_entropy(logits, size or logits.shape[-2:], lambda chunk, out: out.zero_())
