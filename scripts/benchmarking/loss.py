"""The section `loss`: the terms alone, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from base.base_method import Batch
from base.base_model import ModelOutput
from scripts.benchmarking.measure import Row, must_agree, say
from scripts.benchmarking.memory import extra_memory
from scripts.benchmarking.networks import defined_losses, make_task, weighted
from scripts.benchmarking.plan import BOTH, Plan, timed
from trainer.methods import METHODS
from utils.distributed import SINGLE
from utils.misc import BACKGROUND


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


def measure_loss(plan: Plan) -> list[Row]:
    """The loss terms alone, forward and backward."""
    rows = []
    for old, new, side in plan.losses:
        what = f"{1 + old + new} classes, {new} new, 2 × {side}²"
        say(f"loss: {what}")
        calls = {way: make_loss(way, side, old, new, plan.device) for way in BOTH}
        plain, ours = (call() for call in calls.values())
        for name, values in plain.items():
            must_agree(f"loss, {name}", values.cpu(), ours[name].cpu(), 1e-5)
        del plain, ours
        times = {name: 1e3 * value for name, value in timed(plan, calls).items()}
        used = extra_memory(plan, BOTH, make_loss, side, old, new)
        rows.append(Row("loss", what, "ms", times["plain"], times["ours"]))
        rows.append(Row("loss", "  extra memory", "MiB", used["plain"], used["ours"]))
    return rows
