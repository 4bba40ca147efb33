"""The tests of runs, as `metrics.json` and what lies beside it say; None where they do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset
from data_loader import data_set
from trainer.shared_step import FILE as BASE
from utils.checkpoint import final_checkpoint
from utils.errors import UserError
from utils.history import FILE as HISTORY
from utils.run_folder import MODELS, counterpart, is_step

Schedule = tuple[tuple[int, ...], ...]  # label ids of each step
TASK = "data_loader.args.task"
MEMORY = "data_loader.args.memory.mem_size"


@dataclass(frozen=True)
class Result:
    """The test of a step.

    Attributes:
        file: its `metrics.json`.
        content: what that holds.
        config: of the step, by dotted key.
        history: losses, times and memory of its training.
        base: of a step 0 that was taken with `--base`, what decided its weights.
        passes: name of a further pass over the test images (`scripts/protocol.py`) → its wide
            confusion matrix.
        damaged: name of a file beside it that is damaged, and therefore empty here → why.
    """

    file: Path
    content: dict[str, Any]
    config: dict[str, Any]
    history: dict[str, Any]
    base: dict[str, Any]
    passes: dict[str, np.ndarray] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step of the schedule."""
        return self.content["step"]

    @property
    def joint(self) -> bool:
        """Whether joint training gave the weights."""
        return self.content.get("joint", self.config.get(f"{TASK}.joint", False))

    @property
    def dataset(self) -> str:
        """Short name of the data set."""
        return self.content["dataset"]

    @cached_property
    def schedule(self) -> Schedule:
        """Label ids of each step; of older files from the config or the tables."""
        steps = self.content.get("steps", self.config.get(f"{TASK}.steps"))
        if steps is None:
            known = data_set(self.dataset)
            tables = known.tables if known else {}
            if self.content["task"] not in tables:
                raise UserError(
                    f"{self.file} does not tell the steps of task '{self.content['task']}', and "
                    f"there is no config.json in {counterpart(self.file.parent, MODELS)} that does."
                )
            steps = tables[self.content["task"]]
        return tuple(map(tuple, steps))

    @property
    def seed(self) -> int | None:
        """The seed of the run."""
        return self.content.get("seed", self.config.get("seed"))

    @property
    def background(self) -> bool:
        """Whether label id 0 is background."""
        return len(self.content["classes"]) == len(self.content["confusion"])

    @cached_property
    def channels(self) -> dict[int, int]:
        """Label id → channel, of what `classes` holds: background, if any, and the seen classes."""
        first = 0 if self.background else 1
        return {row["label_id"]: k for k, row in enumerate(self.content["classes"], first)}

    @cached_property
    def names(self) -> dict[int, str]:
        """Label id → name, of all classes of the data set that the file names."""
        rows = [*self.content["classes"], *self.content.get("future_classes", [])]
        return {row["label_id"]: row["name"] for row in rows}

    @cached_property
    def confusion(self) -> np.ndarray:
        """[K, K] pixel counts as the evaluation counted: rows = labels, columns = preds."""
        return np.array(self.content["confusion"], dtype=np.int64)

    @cached_property
    def wide(self) -> np.ndarray | None:
        """[1 + all classes, K]; of older files None, unless every class has been seen."""
        if "wide" in self.content:
            return np.array(self.content["wide"], dtype=np.int64)
        everything = {*labels_of(self.schedule), *self.names}
        return self.confusion if everything <= self.channels.keys() else None

    @property
    def future(self) -> int:
        """What pixels of future classes counted as: 0, background, or 255, nothing."""
        if "protocol" in self.content:
            return self.content["protocol"]["future_classes"]
        published = (data_set(self.dataset) or BaseDataset).future
        return self.config.get("data_loader.args.test.args.masking_value", published)

    @property
    def cropped(self) -> str | None:
        """What the evaluation made of the images, such as "centre crop 512"."""
        return self.content.get("protocol", {}).get("images")

    def list_of(self, split: str) -> dict[str, Any]:
        """The list of images "train" or "test": number, hashes; empty where none is named."""
        return self.content.get("lists", {}).get(split, {})

    @property
    def weights(self) -> Path | None:
        """Their file: of a step's own test the final checkpoint, wherever the run lies now."""
        if is_step(self.file.parent):
            return final_checkpoint(counterpart(self.file.parent, MODELS))
        path = self.content.get("weights")
        return Path(path) if path else None

    @property
    def global_batch(self) -> int | None:
        """Images of an iteration of its training."""
        return self.history.get("global_batch", self.base.get("global batch"))

    @property
    def lost_batch(self) -> bool:
        """Whether the file that held `global_batch` is damaged."""
        return self.global_batch is None and bool({HISTORY, BASE} & self.damaged.keys())

    @property
    def memory(self) -> int:
        """Exemplars of the step."""
        size = self.content.get("memory", self.config.get(MEMORY, 0))
        return size if self.step > 0 else 0

    @property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Loss term → (epoch, mean)."""
        terms: dict[str, list[tuple[int, float]]] = {}
        for epoch in self.history.get("epochs", []):
            for term, value in epoch.get("losses", {}).items():
                terms.setdefault(term, []).append((epoch["epoch"], value))
        return terms


@dataclass(frozen=True)
class Run:
    """The tested steps of one run: the folder of its log, and its results by step, ascending."""

    folder: Path
    results: dict[int, Result] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def last(self) -> Result:
        """The test of its last step."""
        return self.results[max(self.results)]


def labels_of(schedule: Schedule) -> list[int]:
    """All label ids of a schedule, in order of arrival."""
    return [label for ids in schedule for label in ids]
