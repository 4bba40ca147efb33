"""The section `growth`: more classes, more heads, more processes."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_loader.transforms import normalize
from scripts.benchmarking.measure import Row, must_agree, say
from scripts.benchmarking.memory import extra_memory, freed_at_once, peak_increase
from scripts.benchmarking.networks import Net
from scripts.benchmarking.plan import BOTH, Plan, timed
from scripts.benchmarking.step import make_step, step_seconds
from utils.files import write_json
from utils.processes.launch import Launch, launch
from utils.ranks import Ranks


def measure_growth(plan: Plan) -> list[Row]:
    """Step time and memory with more classes, more heads and more processes."""
    rows, (backbone, side) = [], plan.growth
    for shape in plan.grown:
        what = f"{1 + sum(shape)} classes, {1 + len(shape)} heads"
        say(f"growth: {what}, {backbone}, {plan.batch} × {side}²")
        args = (side, shape, backbone, plan.batch)
        milliseconds = {name: 1e3 * value for name, value in step_seconds(plan, *args).items()}
        rows.append(Row("growth", f"{what}, {backbone}", "ms", **milliseconds))
        used = extra_memory(plan, BOTH, make_step, *args)
        rows.append(Row("growth", "  extra memory", "MiB", **used))
    return rows + measure_processes(plan)


@dataclass(frozen=True)
class Job:
    """What each process of `measure_processes` is told.

    Attributes:
        plan: how much is measured.
        figures: where rank 0 leaves the loss and what it measured.
        memory: measure MiB, else seconds.
    """

    plan: Plan
    figures: Path
    memory: bool


def measure_processes(plan: Plan) -> list[Row]:
    """The same global batch in one process and in two; on a CPU they share the cores."""
    rows, losses, cuda = [], [], plan.device.type == "cuda"
    for count in range(1, 1 + (min(2, torch.cuda.device_count()) if cuda else 2)):
        what = f"{count} process(es), {2 * plan.batch} images in all"
        say(f"growth: {what}")
        with freed_at_once():
            loss, mebibytes = in_group(plan, count, memory=True)
        losses += [loss]
        loss, seconds = in_group(plan, count, memory=False)
        losses += [loss]
        must_agree("growth, loss of the processes", losses, losses[:1] * len(losses), 1e-3)
        rows.append(Row("growth", f"{what}, {plan.growth[0]}", "ms", None, 1e3 * seconds))
        rows.append(Row("growth", "  extra memory of each", "MiB", None, mebibytes))
    return rows


def in_group(plan: Plan, count: int, *, memory: bool) -> list[float]:
    """Loss of a training step in so many processes, and its MiB or seconds."""
    cuda = plan.device.type == "cuda"
    devices = [torch.device("cuda", rank) if cuda else plan.device for rank in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(plan, Path(folder) / "figures.json", memory)
        launch(
            train_in_group,
            job,
            Launch(
                devices=tuple(devices),
                backend="nccl" if cuda else "gloo",
                url="tcp://127.0.0.1:12345",  # or another port when that is busy
            ),
        )
        return json.loads(job.figures.read_text(encoding="utf-8"))


def train_in_group(job: Job, ranks: Ranks) -> None:
    """Training steps of one process, which has its share of the batch."""
    plan, (backbone, side) = job.plan, job.plan.growth
    net = Net((15, 5), backbone, ranks.device)
    trainer = net.trainer(ranks)

    def batch(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = net.batch(2 * plan.batch, side)
        images, labels = (x[ranks.rank :: ranks.world] for x in (sample.image, sample.label))
        return normalize(images.to(ranks.device)), labels.to(ranks.device)

    whole = batch(side)
    loss = ranks.sum(trainer.train_step([whole]).loss).item() / ranks.world
    if job.memory:
        value = peak_increase(lambda: trainer.train_step([whole]), ranks.device)
    else:
        # As many steps in every process: they wait for each other.
        counted = replace(plan, rounds=10, budget=0, device=ranks.device)
        value = timed(counted, {"step": lambda: trainer.train_step([whole])})["step"]
        if plan.clock is time.process_time:
            value = ranks.sum(torch.tensor(value)).item()
    if ranks.is_main:
        write_json(job.figures, [loss, value])
