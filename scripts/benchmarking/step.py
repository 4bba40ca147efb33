"""The section `step`: whole training steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from data_loader.transforms import normalize
from scripts.benchmarking.measure import Row, largest, must_agree, say
from scripts.benchmarking.memory import extra_memory
from scripts.benchmarking.networks import Net
from scripts.benchmarking.plan import BOTH, Plan, Shape, timed


def make_step(
    way: str, side: int, shape: Shape, backbone: str, batch: int, device: torch.device
) -> Callable[[], Any]:
    """One training step: in the plain way, ours, or ("limit") the network alone."""
    net = Net(shape, backbone, device)
    sample = net.batch(batch, side)
    images, labels = normalize(sample.image.to(device)), sample.label.to(device)
    if way == "plain":
        return partial(net.plain_step(), images, labels)
    trainer = net.trainer()
    if way == "limit":  # the networks as the trainer has them
        return partial(net.network_only, images)
    return lambda: trainer.train_step([(images, labels)])


# How cuDNN and cuBLAS tell that there is no room, and torch that a tensor has too many elements.
NO_ROOM = ("unable to find an engine", "ALLOC_FAILED", "INT_MAX")


def fits(plan: Plan, way: str, shape: Shape, batch: int) -> bool:
    """Whether training steps with this batch find room on the GPU."""

    def two_steps() -> None:
        call = make_step(way, plan.crop, shape, plan.backbone, batch, plan.device)
        torch.backends.cudnn.benchmark = False  # a search for two steps; `Net` sets it again
        call()
        call()  # the first had no momentum yet

    try:
        two_steps()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def step_seconds(
    plan: Plan, side: int, shape: Shape, backbone: str, batch: int
) -> dict[str, float]:
    """Median seconds of a step each way, once the first steps agree."""
    args = (side, shape, backbone, batch, plan.device)
    calls = {way: make_step(way, *args) for way in ("plain", "ours", "limit")}
    plain, ours = calls["plain"](), calls["ours"]().values()
    for name, value in plain.items():  # half precision leaves three digits
        tolerance = 1e-3 if plan.device.type == "cpu" else 3e-2
        must_agree(f"step, {name}", value, ours[name].item(), tolerance)
    return timed(plan, calls)


def measure_step(plan: Plan) -> list[Row]:
    """Whole training steps: student, teacher, DKD, SGD; on a GPU also memory and largest batch."""
    rows = []
    for what, shape in plan.shapes.items():
        say(f"step: {what}, {plan.backbone}, {plan.batch} × {plan.crop}²")
        args = (plan.crop, shape, plan.backbone, plan.batch)
        seconds = step_seconds(plan, *args)
        rates = {name: plan.batch / value for name, value in seconds.items()}
        rows.append(Row("step", f"{what}, {plan.backbone}", "images/s", **rates))
        if plan.device.type != "cuda":
            continue
        used = extra_memory(plan, BOTH, make_step, *args)
        rows.append(Row("step", "  extra memory", "MiB", **used))
        say(f"step: {what}, the largest batch that fits")
        most = {way: float(largest(partial(fits, plan, way, shape))) for way in BOTH}
        rows.append(Row("step", "  largest batch", "images", **most))
    return rows
