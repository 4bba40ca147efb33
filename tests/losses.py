"""A loss by its name, as defined and as methods call it, with its gradient; how they differ."""

import torch

from models import loss
from models.fast import losses as fast_loss

VOID = 255
SIGMOID, SOFTMAX = ("mbce", "kd", "ac"), ("ce", "unbiased ce", "unbiased kd")
TERMS = SIGMOID + SOFTMAX


def term_of(module, term, logits, teacher, labels, first, pos_weight):
    if term == "mbce":
        return module.mbce(logits, labels, first, pos_weight)
    if term == "kd":
        return module.distillation(logits, teacher, labels.shape[-2:])
    if term == "unbiased kd":
        return module.soft_distillation(logits, teacher[:, :-1], labels.shape[-2:])
    if term in SOFTMAX:
        void = torch.iinfo(labels.dtype).max
        channels = (labels % logits.shape[1]).masked_fill(labels == VOID, void)
        return module.cross_entropy(logits, channels, 1 if term == "ce" else logits.shape[1] - 1)
    return module.auxiliary(logits, labels.shape[-2:])


def plain(term, *given):
    """As it is defined."""
    return term_of(loss, term, *given)


def chunked(term, *given):
    """As methods call it."""
    return term_of(fast_loss, term, *given)


def make(small, size, classes=7, images=2, dtype=torch.float32):
    """Student and teacher logits, and labels of classes 3, 4, … with background and void."""
    logits = (3 * torch.randn(images, classes, *small)).to(dtype)
    teacher = (3 * torch.randn(images, classes, *small)).to(dtype)
    labels = torch.randint(0, 3 + classes, (images, *size)).to(torch.uint8)
    labels[:, :2] = VOID
    return logits.requires_grad_(), teacher, labels, 3, 2.5


def both(function, term, logits, *rest):
    """Loss per class [C], and the gradient of their sum with a weight each [C, N·h·w].

    A loss of all classes together is one class: [1] and [1, N·C·h·w].
    """
    terms = function(term, logits, *rest)
    weights = torch.linspace(1, 2, len(terms), dtype=terms.dtype, device=terms.device)
    (gradient,) = torch.autograd.grad((weights * terms).sum(), logits)
    return terms.detach(), gradient.transpose(0, 1).reshape(len(terms), -1)


def exact(term, logits, teacher, *rest):
    """The definition and its gradient in float64: in float32 autograd's are themselves 1e-6 off."""
    return both(plain, term, logits.detach().double().requires_grad_(), teacher.double(), *rest)


def errors(got, expected):
    """Largest deviation of a class relative to the class, of loss and of gradient: [2]."""
    found = []
    for a, b in zip(got, expected, strict=True):
        a, b = a.double().view(len(a), -1), b.double().view(len(b), -1)
        found.append(((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-300)).max())
    return torch.stack(found)
