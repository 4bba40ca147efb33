"""A step's task, networks and trainer as a run makes them, but of random weights and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from base.base_method import BaseMethod, Batch
from base.task import Task
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.dataset import Sample
from models.weights import load_previous_step
from scripts.benchmarking.definitions import by_definition
from scripts.benchmarking.plan import Shape
from trainer.build import apply_fast, build_model
from trainer.evaluation import Evaluation
from trainer.methods import METHODS
from trainer.optim import build_optimizer, build_scheduler
from trainer.provenance import Provenance
from trainer.trainer import Trainer
from utils.labels import BACKGROUND
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE, Ranks

ITERATIONS = 10_000  # of the schedule, more than are measured


def make_task(shape: Shape) -> Task:
    """The last step of a schedule with so many classes per step."""
    ends = np.cumsum(shape).tolist()
    steps = tuple(tuple(range(1 + end - n, 1 + end)) for end, n in zip(ends, shape, strict=True))
    names = tuple(f"class{label}" for label in range(1 + ends[-1]))
    return Task("benchmark", "own", "overlap", len(shape) - 1, steps, names)


def defined_losses(method: BaseMethod, *given: Any) -> dict[str, torch.Tensor]:
    """`method.losses` in the plain way: at full resolution, as `models/loss.py` defines them."""
    with by_definition():
        return method.losses(*given)


def weighted(method: BaseMethod, terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar whose gradient is taken."""
    return sum(method.weights[name] * term.sum() for name, term in terms.items())


class Stub(IncrementalDataLoader):
    """What a trainer reads of a loader bundle before any loading."""

    def __init__(self, task: Task):
        self.task = task

    def fixed_size(self, kind: str) -> bool:
        return True


class Net:
    """A step's networks with random weights and what trains them, wired as a run does.

    The same arguments give the same weights.
    """

    def __init__(self, shape: Shape, backbone: str, device: torch.device):
        self.task, self.device = make_task(shape), device
        argv = ["--task_name=15-5", "--task_step=1", "--freeze_bn", "--lr=1e-4"]
        self.config = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
        self.method = METHODS["dkd"](self.task, self.config["hyperparameter"])
        torch.manual_seed(0)
        plan, arch = self.method.heads(), {"backbone": backbone, "backbone_pretrained": False}
        self.teacher = build_model(self.config, plan.previous(), **arch)
        for name, parameter in self.teacher.named_parameters():
            if name.endswith("bn3.weight"):
                # Else the frozen BatchNorm of a random network lets every block double its values.
                torch.nn.init.constant_(parameter, 0.2)
        self.student = build_model(self.config, plan, **arch, dropout=False)
        new, weights = len(plan.sizes) - 1, self.teacher.state_dict()
        load_previous_step(self.student, weights, new, "the teacher")
        self.method.start(self.student, {})
        self.teacher.requires_grad_(False).eval().to(device)
        self.student.train().to(device)
        torch.backends.cudnn.benchmark = True

    def autocast(self, switch: str = "use_amp") -> torch.amp.autocast:
        """Mixed precision where a run uses it: in training, or with "eval_amp" in evaluation."""
        kind = self.device.type
        dtype = getattr(torch, self.config["amp_dtype"])
        return torch.amp.autocast(kind, dtype, enabled=self.config[switch] and kind == "cuda")

    def trainer(self, ranks: Ranks | None = None) -> Trainer:
        """The project's own, made as a run makes it for training."""
        ranks = ranks or Ranks(0, 1, self.device)
        apply_fast(self.config, self.student, self.teacher, trains=True)
        optimizer = build_optimizer(self.config, self.method, self.student)
        scheduler = build_scheduler(self.config, optimizer, ITERATIONS)
        parts: dict[str, Any] = {"method": self.method, "student": self.student}
        parts |= {"teacher": self.teacher, "optimizer": optimizer, "scheduler": scheduler}
        return Trainer(self.config, ranks, data=Stub(self.task), provenance=Provenance(), **parts)

    def evaluation(self) -> Evaluation:
        """The project's own, made as a run makes it for evaluation."""
        apply_fast(self.config, self.student, trains=False)
        parts: dict[str, Any] = {"method": self.method, "student": self.student}
        return Evaluation(self.config, Ranks(0, 1, self.device), data=Stub(self.task), **parts)

    def batch(self, count: int, side: int) -> Sample:
        """Random images and labels of the classes."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)
        coarse = torch.randint(0, 2 + len(self.task.seen), (count, 1, 8, 8), generator=generator)
        coarse[coarse > len(self.task.seen)] = self.task.void
        ids = F.interpolate(coarse.float(), size=(side, side))[:, 0].long()
        labels = torch.from_numpy(self.task.label_table(self.task.seen, BACKGROUND))[ids]
        return default_collate(
            [Sample(image, label, "") for image, label in zip(images, labels, strict=True)]
        )

    def plain_step(self) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
        """A training step in the plain way; every term is fetched."""
        args = dict(self.config["optimizer"]["args"])
        groups = self.method.parameter_groups(self.student, args["lr"], args["weight_decay"])
        optimizer = torch.optim.SGD(groups, **args)
        scheduler = build_scheduler(self.config, optimizer, ITERATIONS)
        mixed = self.config["use_amp"] and self.device.type == "cuda"
        scaler = torch.amp.GradScaler(self.device.type, enabled=mixed)

        def step(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
            optimizer.zero_grad()
            with self.autocast():
                outputs = self.student(images, self.method.wants)
                with torch.no_grad():
                    targets = self.teacher(images, self.method.wants)
            terms = defined_losses(self.method, Batch(images, labels), outputs, targets, SINGLE.sum)
            loss = weighted(self.method, terms)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            return {"loss": loss.item()} | {name: t.mean().item() for name, t in terms.items()}

        return step

    def network_only(self, images: torch.Tensor) -> None:
        """Teacher forward, student forward and backward; the loss is the sum of the outputs."""
        with self.autocast():
            outputs = self.student(images, self.method.wants)
            with torch.no_grad():
                self.teacher(images, self.method.wants)
        self.student.zero_grad(set_to_none=True)
        sum(output.float().sum() for output in outputs if output is not None).backward()
