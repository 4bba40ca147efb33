"""The section `loss`: the terms alone, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from base.base_method import Batch
from base.base_model import ModelOutput
from models import loss as definitions
from models.fast import losses as fast_loss
from scripts.benchmarking.measure import Row, must_agree, say
from scripts.benchmarking.memory import extra_memory
from scripts.benchmarking.networks import defined_losses, make_task, weighted
from scripts.benchmarking.plan import BOTH, Plan, timed
from trainer.methods import METHODS
from utils.labels import BACKGROUND
from utils.ranks import SINGLE


def make_loss(
    way: str, side: int, old: int, new: int, device: torch.device
) -> Callable[[], dict[str, torch.Tensor]]:
    """All terms forward and backward for two images, from logits at a sixteenth of their side.

    Returns:
        The call, which returns terms and gradients by name.
    """
    task = make_task((old, new))
    method = METHODS["dkd"](task, {"pos_weight": 2})
    generator = torch.Generator().manual_seed(0)

    def outputs(channels: int, parts: int, trained: bool) -> ModelOutput:
        counts = (channels, parts, parts)
        maps = (2 * torch.randn(2, n, side // 16, side // 16, generator=generator) for n in counts)
        logits, pos, neg = (x.to(device).requires_grad_(trained) for x in maps)
        return ModelOutput(logits, pos, neg)

    student = outputs(1 + old + new, old + new, True)
    teacher = outputs(1 + old, old, False)
    ids = torch.tensor([BACKGROUND, task.void, *task.new])
    drawn = torch.randint(0, len(ids), (2, side, side), generator=generator)
    labels = torch.from_numpy(task.label_table(task.new, BACKGROUND))[ids[drawn]].to(device)
    losses = partial(defined_losses, method) if way == "plain" else method.losses
    no_images = torch.empty(2, 3, 0, 0, device=device)
    leaves = {name: x for name, x in student._asdict().items() if x is not None}

    def call() -> dict[str, torch.Tensor]:
        for leaf in leaves.values():
            leaf.grad = None
        terms = losses(Batch(no_images, labels), student, teacher, SINGLE.sum)
        weighted(method, terms).backward()
        slopes = {f"{name} slope": x.grad for name, x in leaves.items()}
        return {name: term.detach() for name, term in terms.items()} | slopes

    return call


def make_softmax(
    way: str, side: int, old: int, new: int, device: torch.device
) -> Callable[[], dict[str, torch.Tensor]]:
    """MiB's two terms, unbiased, forward and backward, from logits at a sixteenth of the side.

    Returns:
        The call, which returns terms and gradient by name.
    """
    module = definitions if way == "plain" else fast_loss
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1 + old + new, side // 16, side // 16)
    logits, teacher = (2 * torch.randn(shape, generator=generator).to(device) for _ in "st")
    labels = torch.randint(0, 1 + old + new, (2, side, side), generator=generator)
    labels = labels.to(torch.uint8).to(device)
    logits.requires_grad_()

    leaves = {"slope": logits}

    def call() -> dict[str, torch.Tensor]:
        logits.grad = None
        terms = {
            "ce": module.cross_entropy(logits, labels, 1 + old),
            "kd": module.soft_distillation(logits, teacher[:, : 1 + old], (side, side)),
        }
        sum(terms.values()).sum().backward()
        slopes = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        return {name: term.detach() for name, term in terms.items()} | slopes

    return call


def make_pod(way: str, side: int, device: torch.device) -> Callable[[], dict[str, torch.Tensor]]:
    """Local POD of the five maps of a ResNet-101 for two images, the last its decoder's.

    Returns:
        The call, which returns the term and the gradients by name.
    """
    module = definitions if way == "plain" else fast_loss
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [
            torch.randn(2, channels, side // stride, side // stride, generator=generator)
            .to(device)
            .contiguous(memory_format=torch.channels_last)  # as networks leave them
            for _ in "st"
        ]
        for channels, stride in ((256, 4), (512, 8), (1024, 16), (2048, 16), (256, 16))
    ]
    students = [student.requires_grad_() for student, _ in pairs]

    def call() -> dict[str, torch.Tensor]:
        for student in students:
            student.grad = None
        term = sum(module.local_pod(*pair) for pair in pairs)
        term.sum().backward()
        slopes = {f"slope {k}": x.grad for k, x in enumerate(students) if x.grad is not None}
        return {"pod": term.detach()} | slopes

    return call


def measure_loss(plan: Plan) -> list[Row]:
    """The loss terms alone, forward and backward."""
    rows = []
    for old, new, side in plan.losses:
        what = f"{1 + old + new} classes, {new} new, 2 × {side}²"
        rows += compare(plan, what, make_loss, side, old, new)
    for old, new, side in plan.softmax:
        what = f"softmax, {1 + old + new} classes, {new} new, 2 × {side}²"
        rows += compare(plan, what, make_softmax, side, old, new)
    return rows + compare(plan, f"Local POD, 2 × {plan.pod}²", make_pod, plan.pod)


def compare(
    plan: Plan, what: str, make: Callable[..., Callable[[], dict[str, torch.Tensor]]], *args: int
) -> list[Row]:
    """Time and memory of both ways, which must agree; `make` gets the way, `args`, the device."""
    say(f"loss: {what}")
    calls = {way: make(way, *args, plan.device) for way in BOTH}
    plain, ours = (call() for call in calls.values())
    for name, values in plain.items():
        must_agree(f"loss, {name}", values.cpu(), ours[name].cpu(), 1e-5)
    del plain, ours
    times = {name: 1e3 * value for name, value in timed(plan, calls).items()}
    used = extra_memory(plan, BOTH, make, *args)
    return [
        Row("loss", what, "ms", times["plain"], times["ours"]),
        Row("loss", "  extra memory", "MiB", used["plain"], used["ours"]),
    ]
