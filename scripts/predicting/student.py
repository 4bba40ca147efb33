"""A student that answers for any images: a weight file and the config that lies beside it.

It needs no data set; only the root of one whose class
names are a file there, for these names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from base.base_model import ModelOutput
from data_loader import DATA_SETS
from data_loader.transforms import NoTransform, Transform, eval_transform, normalize
from models.pixels import full_precision, size_of
from scripts.predicting.memory import enough_memory
from trainer.build import apply_fast, build_method, build_task, load_student
from trainer.checks import check_names, with_settings
from trainer.evaluation import Weights
from trainer.precision import Precision
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.config_file import flatten, read_config
from utils.errors import UserError
from utils.files import PROJECT_ROOT
from utils.labels import BACKGROUND
from utils.parse_config import ConfigParser
from utils.processes.devices import find_devices
from utils.recipe import read_layers


class Predictor:
    """What a weight file sees in images, computed as the evaluation does.

    Attributes:
        weights: the file.
        tested: which weights they are.
        config: its own, as an evaluation reads it.
        task, method: of the config.
        model: the student, on `device`, in eval mode.
        device: where it computes.
        label_ids: [channels] label id of each channel, uint8 or uint16.
        steps: the step that taught each class, by label id.
    """

    def __init__(self, config: ConfigParser, weights: Path, device: torch.device):
        """
        Args:
            config: of the weights.
            weights: a checkpoint, or released weights.
            device: where to compute.

        Raises:
            UserError: the weights are damaged, or not those of the config's task and network.
        """
        config = with_settings(config)
        check_names(config)
        self.config, self.weights, self.device = config, weights, device
        self.task = build_task(config)
        self.method = build_method(config, self.task)
        stored = StoredCheckpoint(weights)
        self.model = load_student(config, self.method, stored)
        self.tested = Weights.of(stored.content, weights)
        self.model.to(device)
        apply_fast(config, self.model, trains=False)
        self.model.eval()
        self.precision = Precision.of(config, device)
        self.label_ids = self.task.label_ids()
        taught = enumerate(self.task.schedule[: 1 + self.task.schedule_step])
        self.steps = {label: step for step, ids in taught for label in ids}

    @classmethod
    def of(cls, weights: Path, device: torch.device, data_dir: str | None = None) -> Predictor:
        """The student of a weight file beside which its config lies.

        Args:
            weights: the file.
            device: where to compute.
            data_dir: the data set's root, where the config's is another machine's.

        Raises:
            UserError: the file is missing, or has no config, or as the constructor.
        """
        if not weights.is_file():
            raise UserError(f"there is no weight file {weights}.")
        flags = [f"--resume={weights}", *([f"--data_dir={data_dir}"] if data_dir else [])]
        return cls(
            ConfigParser.from_args("eval", shipped_config(weights), argv=flags), weights, device
        )

    @property
    def names(self) -> dict[int, str]:
        """Class and step by label id, for legends."""
        return {k: f"{self.task.class_names[k]} (step {t})" for k, t in self.steps.items()}

    @property
    def crop_size(self) -> int:
        """Side of the crops that the evaluation judges, in pixels."""
        return self.config["data_loader"]["args"]["test"]["args"]["transform_args"]["crop_size"]

    @property
    def evaluated(self) -> Transform:
        """What the evaluation makes of an image before it predicts."""
        if not self.config["data_loader"]["args"]["test"]["args"]["transform"]:
            return NoTransform()
        data_set = DATA_SETS[self.config["data_loader"]["type"]]
        return eval_transform(data_set.evaluation, self.crop_size)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor, *, slide: bool = False) -> np.ndarray:
        """Label ids of images.

        Args:
            images: [N, 3, H, W] uint8 RGB, on any device.
            slide: as `windows` sees them instead of as a whole.

        Raises:
            TooLarge: there is too little memory.

        Returns:
            [N, H, W] uint8 or uint16, as `label_ids` has them.
        """
        with enough_memory(images):
            output, size = self._see(images, slide)
            return self._ids(self.method.predict(output, size), images)

    @torch.inference_mode()
    def scored(self, images: torch.Tensor, *, slide: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Label ids of images and how sure the method is of each.

        Args:
            images, slide: as in `predict`.

        Raises:
            TooLarge: as `predict`.

        Returns:
            Label ids as of `predict`, and [N, H, W] float32 from 0 to 1: the score of the class as
            the method's `confident` has it; where background won, what the likeliest class leaves
            of 1.
        """
        with enough_memory(images):
            output, size = self._see(images, slide)
            preds = self.method.predict(output, size)
            _, score = self.method.confident(output, size)
            score = torch.where(preds == BACKGROUND, 1 - score, score)
            height, width = size_of(images)
            return self._ids(preds, images), score[:, :height, :width].float().cpu().numpy()

    def _ids(self, preds: torch.Tensor, images: torch.Tensor) -> np.ndarray:
        height, width = size_of(images)
        return self.label_ids[preds[:, :height, :width].cpu().numpy()]

    def _see(self, images: torch.Tensor, slide: bool) -> tuple[ModelOutput, tuple[int, int]]:
        """The network's outputs, and the size that they are of, which may exceed the images'."""
        pixels = normalize(images.to(self.device))
        if not slide:
            return self._network(pixels), size_of(pixels)
        stride = self.config["arch"]["args"]["output_stride"]
        height, width = size_of(pixels)
        pixels = F.pad(pixels, (0, -width % stride, 0, -height % stride))  # with the mean colour
        return self.windows(pixels), size_of(pixels)

    def _network(self, pixels: torch.Tensor) -> ModelOutput:
        with self.precision.autocast(self.config["eval_amp"]):
            return self.model(pixels, self.method.answers_from)

    def windows(self, pixels: torch.Tensor) -> ModelOutput:
        """The logits of overlapping windows, averaged where they overlap.

        Windows have the crop size of the evaluation and lie two thirds of it apart, both rounded to
        the output stride; the last of a row or column ends with the image. So their features are
        of one grid and are averaged there: no tensor of all classes has the image's size.

        Args:
            pixels: [N, 3, H, W] float32, normalised; H and W are multiples of the output stride.

        Returns:
            What the method's answers read, [N, channels, H / stride, W / stride] each.
        """
        stride = self.config["arch"]["args"]["output_stride"]
        height, width = (length // stride for length in size_of(pixels))  # in features, as below
        side = -(-self.crop_size // stride)
        step = max(1, side * 2 // 3)
        sums: dict[str, Any] = {}
        count = torch.zeros(height, width, device=self.device)
        for rows in spans(height, side, step):
            for columns in spans(width, side, step):
                y, x = (slice(s.start * stride, s.stop * stride) for s in (rows, columns))
                output = self._network(pixels[..., y, x])
                for name in ("logits", *self.method.answers_from):
                    part = full_precision(output.require(name))
                    if name not in sums:
                        sums[name] = part.new_zeros(*part.shape[:2], height, width)
                    sums[name][..., rows, columns] += part
                count[rows, columns] += 1
        return ModelOutput(**{name: total / count for name, total in sums.items()})


def one_device(text: str | None) -> torch.device:
    """The device that `-d` names; by default the first GPU or, without one, the CPU.

    Raises:
        UserError: it names several, or none that is there.
    """
    device, *others = find_devices(text)
    if others and text is not None:
        raise UserError(f"-d {text} names several devices; this runs on one.")
    return device


def spans(length: int, side: int, step: int) -> list[slice]:
    """Where windows of one dimension lie: `step` apart, the last one at the end."""
    side = min(side, length)
    starts = [*range(0, length - side, step), length - side]
    return [slice(start, start + side) for start in starts]


def shipped_config(weights: Path) -> str:
    """The shipped config, relative to the project, of the data set that weights are for.

    Raises:
        UserError: there is no config beside the weights, or of a data set that nobody knows.
    """
    beside, bundle = weights.parent / "config.json", "data_loader.type"
    if not beside.is_file():
        raise UserError(
            f"there is no config.json beside {weights}; put the one there that they were trained "
            "with."
        )
    named = flatten(read_config(beside), str(beside), strict=False)[0].get(bundle)
    for shipped in sorted((PROJECT_ROOT / "configs").glob("config_*.json")):
        if read_layers(shipped).plain[bundle] == named:
            return f"configs/{shipped.name}"
    raise UserError(f"{beside}: {bundle} is '{named}', which no shipped config has.")


def trained_steps(run: Path) -> dict[int, Path]:
    """The final checkpoint of each step of a run, models/EXPERIMENT, by step.

    Raises:
        UserError: it has none.
    """
    found = {
        int(match[1]): weights
        for folder in run.glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", folder.name))
        and (weights := files.final_checkpoint(folder)) is not None
    }
    if not found:
        raise UserError(
            f"{run} has no step_0, step_1, … with a checkpoint-epoch*.pth; name the folder of a "
            "run, such as saved_voc/models/overlap_15-5_DKD."
        )
    return dict(sorted(found.items()))
