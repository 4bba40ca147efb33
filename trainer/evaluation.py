"""What evaluates: a student's answers on the test set, and on the validation set while it trains.

The same for weights that are only tested. Trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.base_method import BaseMethod
from base.base_model import BaseModel
from base.task import Task
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.dataset import IncrementalDataset, Sample
from data_loader.transforms import normalize
from models.pixels import size_of
from trainer.precision import Precision
from trainer.provenance import code_hash, own_code
from trainer.results import PREVIOUS, WEIGHTS
from utils import VERSION
from utils.checkpoint import weights_hash
from utils.errors import listing
from utils.files import write_json
from utils.history import device_name
from utils.labels import BACKGROUND
from utils.logger import log, progress
from utils.metric import EVALUATORS, ConfusionMatrix, Evaluator, merge_future, scalars
from utils.parse_config import ConfigParser
from utils.ranks import Ranks
from utils.report import metrics_json, summary, table


class Weights(NamedTuple):
    """Which weights a test is of.

    Attributes:
        file: where they lie.
        epoch: after how many epochs; 0 of released ones.
        sha256: hash of what they are (`checkpoint.weights_hash`).
        previous: hash of the previous step's, from which they were trained, where it is known.
        lengthened: epochs after which their finished step was made longer.
    """

    file: Path
    epoch: int
    sha256: str
    previous: str | None = None
    lengthened: Sequence[int] = ()

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], file: Path) -> Weights:
        """Of what a checkpoint holds."""
        return cls(
            file,
            int(checkpoint.get("epoch", 0)),
            weights_hash(checkpoint["state_dict"]),
            checkpoint.get("previous"),
            checkpoint.get("record", {}).get("lengthened", ()),
        )


class Evaluation:
    """Evaluates a student with the method's `predict`."""

    def __init__(
        self,
        config: ConfigParser,
        ranks: Ranks,
        *,
        data: IncrementalDataLoader,
        method: BaseMethod,
        student: BaseModel,
    ):
        """
        Args:
            config: the effective configuration.
            ranks: this process.
            data: task and loaders.
            method: says what an output means.
            student: the model, on the device.
        """
        self.config, self.ranks = config, ranks
        self.task: Task = data.task
        self.data, self.method, self.student = data, method, student
        self.test_evaluator, self.val_evaluator = build_evaluators(config, self.task)
        self.precision = Precision.of(config, ranks.device)
        if config["use_amp"] and ranks.device.type != "cuda":
            log.info("use_amp: mixed precision is for CUDA; computing in float32 on the CPU")

    @torch.inference_mode()
    def evaluate(self, loader: DataLoader | Sequence[Sample], kind: str) -> np.ndarray:
        """Count the pixels of a loader; every rank evaluates its share.

        Args:
            loader: this rank's images.
            kind: "val" or "test", for the progress bar.

        Returns:
            The wide confusion matrix over all ranks: [1 + all classes, K] int64, rows = labels,
            columns = preds, K = background and the classes seen.
        """
        self.student.eval()
        # As in training: cuDNN would go on trying where image sizes differ.
        torch.backends.cudnn.benchmark = self.data.fixed_size(kind)
        half = self.config["eval_amp"]
        fewest = min(self.ranks.gather(len(loader)))
        rows, columns = 1 + len(self.task.classes), 1 + len(self.task.seen)
        confusion = ConfusionMatrix(rows, columns, self.ranks.device)
        for number, batch in enumerate(
            progress(
                loader,
                desc=f"{kind} step {self.task.schedule_step}",
                disable=not self.ranks.is_main,
                unit="it",
            )
        ):
            if number < fewest:  # ranks with an image more must not ask those that are done
                self.ranks.stop_if_asked()
            on_device = batch.on(self.ranks.device)
            with self.precision.autocast(half):
                output = self.student(on_device.images, self.method.answers_from)
            preds = self.method.predict(output, size_of(on_device.labels))
            confusion.update(on_device.labels, preds)
        self.ranks.sum(confusion.cells)
        return confusion.matrix()

    @torch.inference_mode()
    def examples(self, count: int = 4) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The first validation images, their labels and the student's answers, on this rank alone.

        Draws no random number and changes nothing.

        Returns:
            Of each: RGB [H, W, 3] uint8, labels and preds [H, W] as label ids.
        """
        self.student.eval()
        seen = []
        for number in range(min(count, len(self.data.val_set))):
            sample = self.data.val_set[number]
            pixels = normalize(sample.image[None].to(self.ranks.device))
            with self.precision.autocast(self.config["eval_amp"]):
                output = self.student(pixels, self.method.answers_from)
            preds = self.method.predict(output, size_of(sample.label))[0].cpu().numpy()
            labels = self.task.to_ids(sample.label.numpy())
            image = sample.image.permute(1, 2, 0).numpy()
            seen.append((image, labels, self.task.to_ids(preds)))
        return seen

    def validate(self, epoch: int) -> dict[str, float]:
        """Evaluate the validation set; labels are those of the new classes.

        Returns:
            The scalars of its evaluator, in percent.

        Raises:
            Interrupted: when a rank was asked to stop.
        """
        file = self.config.log_dir() / "val" / "metrics.json"
        loader, images = self.data.val_loader, self.data.val_set
        return self._report("val", loader, images, self.val_evaluator, file, {"epoch": epoch})

    def test(self, file: Path, weights: Weights | None) -> dict[str, float]:
        """Evaluate the test set and write `file`, a `metrics.json`.

        Args:
            file: where to.
            weights: which weights these are; rank 0 has to know.

        Returns:
            As `validate`.

        Raises:
            Interrupted: when a rank was asked to stop.
        """
        loader, images = self.data.test_loader, self.data.test_set
        about: dict[str, Any] = {}
        if weights is not None:
            about = {
                "epoch": weights.epoch,
                "weights": str(weights.file),
                WEIGHTS: weights.sha256,
                PREVIOUS: weights.previous,
                "lengthened": list(weights.lengthened),
            }
        return self._report("test", loader, images, self.test_evaluator, file, about)

    def _report(
        self,
        kind: str,
        loader: DataLoader,
        images: IncrementalDataset,
        evaluator: Evaluator,
        file: Path,
        weights: Mapping[str, Any],
    ) -> dict[str, float]:
        start = time.perf_counter()
        wide = self.evaluate(loader, kind)
        seconds = time.perf_counter() - start
        future = self.data.masking_value(kind)
        results = evaluator.evaluate(merge_future(wide, future))
        if self.ranks.is_main:
            precision = self.precision.name(self.config["eval_amp"])
            about = self._about(kind) | {
                "images": len(images),
                "precision": precision,
                **weights,
                "seconds": round(seconds, 3),
            }
            ids = self.task.label_ids(unseen=True)
            names = self.task.channel_names(unseen=True)
            report = metrics_json(about, wide, future, ids, names, results)
            if kind == "val":  # whose labels hide all classes but the new ones
                del report["wide"], report["future_classes"]
            write_json(file, report)
            step, count = self.task.schedule_step, len(images)
            if kind == "val":  # short, for its figures are others than the test's; the file has all
                hidden = "as background" if future == BACKGROUND else "not at all"
                log.info(
                    "val, step %d, %d images, %s; labels of the new classes alone, the others "
                    "count %s: %s",
                    *(step, count, precision, hidden),
                    listing(f"{name} {value:.2f}" for name, value in scalars(results).items()),
                )
            else:
                log.info("test, step %d, %d images, %s: all classes seen", step, count, precision)
                log.info("%s\n", table(report))
                log.info("%s", summary(report))
            log.info("written: %s", file)
        return scalars(results)

    def _about(self, kind: str) -> dict[str, Any]:
        """What a `metrics.json` says of an evaluation beside its result."""
        config, task, data = self.config, self.task, self.data
        return {
            "dataset": task.dataset,
            "task": task.name,
            "setting": task.setting,
            "step": task.schedule_step,
            "steps": [list(ids) for ids in task.schedule],
            "joint": bool(task.joint),
            "name": config["name"],
            "method": config["method"],
            "memory": config["data_loader"]["args"]["memory"]["mem_size"],
            "seed": config["seed"],
            "split": kind,
            "version": VERSION,
            "code": code_hash(),
            "own_code": own_code(config),
            "torch": str(torch.__version__),
            "device": device_name(self.ranks.device),
            "lists": data.lists(),
            "protocol": {
                "future_classes": data.masking_value(kind),
                "background": task.background,
                "images": data.evaluated(kind),
            },
        }


def build_evaluators(config: ConfigParser, task: Task) -> tuple[Evaluator, Evaluator]:
    """The evaluators of the test set and of the validation set.

    Test: old = background and the classes of step 0, new = all later ones; at step 0 they are one
    group. Validation: old = background, new = the classes of this step; without a background they
    are one group as well.
    """
    make = config.resolve("evaluator", EVALUATORS)
    base, new = task.base_channels, task.new_channels
    test = make(config["metrics"], base, range(base.stop, new.stop))
    return test, make(config["metrics"], range(base.start, 1), range(new.start, new.stop))
