"""How much the benchmark measures, and the seconds of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from scripts.benchmarking.measure import in_turn

BOTH = ("plain", "ours")

Shape = tuple[int, ...]  # classes of each step; the last is trained, those before it are taught
VOC_STEP = {"VOC 15-5, step 1": (15, 5)}
VOC_LAST = {"VOC 15-1, step 5": (15, *[1] * 5)}
ADE_LAST = {"ADE 100-10, step 5": (100, *[10] * 5)}


@dataclass(frozen=True)
class Plan:
    """How much is measured; the defaults are those of a full run on a CPU.

    Attributes:
        device: where networks and losses compute.
        rounds: measurements of each way at least; their median counts.
        budget: seconds in which there may be more.
        warm: rounds before.
        clock: what tells the seconds.
        pictures, masks: images and masks drawn for `data` and `scan`.
        backbone, crop, batch: of `step` and `eval`.
        shapes: of `step`; the first is also that of `eval`.
        losses: old classes, new classes and image side of `loss`.
        softmax: the same of its softmax terms.
        pod: image side of its Local POD.
        growth: backbone and crop of `growth`.
        grown: its shapes.
    """

    device: torch.device
    rounds: int = 3
    budget: float = 5
    warm: int = 0
    clock: Callable[[], float] = time.perf_counter
    pictures: int = 24
    masks: int = 10_582
    backbone: str = "resnet101"
    crop: int = 512
    batch: int = 2
    shapes: Mapping[str, Shape] = field(default_factory=lambda: VOC_STEP | ADE_LAST)
    losses: Sequence[Shape] = ((15, 5, 512), (100, 10, 512), (140, 10, 512), (990, 10, 128))
    softmax: Sequence[Shape] = ((15, 5, 512), (140, 10, 512))
    pod: int = 512
    growth: tuple[str, int] = ("tiny", 256)
    grown: Sequence[Shape] = (
        *((10, 10), (140, 10), (244, 10)),
        *((15, 1), (15, *[1] * 4), (15, *[1] * 9)),
    )


def make_plan(device: torch.device, quick: bool) -> Plan:
    """What to measure on a device; `quick`: only as much as shows that it works."""
    plan = Plan(device)
    if device.type == "cuda":
        shapes = VOC_STEP | VOC_LAST | ADE_LAST
        plan = replace(plan, warm=3, batch=8, shapes=shapes, growth=("resnet101", 512))
    if quick:
        plan = replace(plan, rounds=2, budget=0.5, pictures=4, masks=64, shapes=VOC_STEP)
        plan = replace(plan, backbone="tiny", crop=64, losses=((15, 5, 128),))
        plan = replace(plan, softmax=((15, 5, 128),), pod=64)
        plan = replace(plan, growth=("tiny", 64), grown=((10, 10),))
    return plan


def timed(plan: Plan, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call."""
    cuda = plan.device.type == "cuda"
    wait = partial(torch.cuda.synchronize, plan.device) if cuda else lambda: None
    return in_turn(calls, plan.rounds, plan.budget, plan.warm, wait, plan.clock)
