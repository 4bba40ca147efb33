"""The tests of runs as their `metrics.json` tell them, found below folders and put in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset
from data_loader import data_set
from trainer.base_step import FILE as BASE
from trainer.results import METRICS, PASSES
from utils.checkpoint import final_checkpoint
from utils.config_file import read_json
from utils.history import FILE as HISTORY
from utils.misc import UserError, listing

Schedule = tuple[tuple[int, ...], ...]  # label ids of each step


@dataclass(frozen=True)
class Result:
    """The test of a step.

    Attributes:
        file: its `metrics.json`.
        content: what that holds.
        config: of the step, empty where it is not found.
        history: what training the step brought and cost, empty where nobody wrote it.
        base: of a step 0 that was taken with `--base`, what decided its weights, else empty.
        passes: further passes over the test images (`scripts/protocol.py`), in words → the wide
            confusion matrix of each.
    """

    file: Path
    content: dict[str, Any]
    config: dict[str, Any]
    history: dict[str, Any]
    base: dict[str, Any]
    passes: dict[str, np.ndarray]

    @property
    def step(self) -> int:
        """The step of the schedule."""
        return self.content["step"]

    @property
    def joint(self) -> bool:
        """Whether joint training gave the weights."""
        return self.content.get("joint", False)

    @property
    def dataset(self) -> str:
        """Short name of the data set."""
        return self.content["dataset"]

    @cached_property
    def schedule(self) -> Schedule:
        """Label ids of each step; of files older than the key, from the config or the tables."""
        steps = self.content.get("steps") or self._task.get("steps")
        if not steps:
            known = data_set(self.dataset)
            tables = known.tables if known else {}
            if self.content["task"] not in tables:
                raise UserError(
                    f"{self.file} does not tell the steps of task '{self.content['task']}', and "
                    f"there is no config.json in {beside(self.file.parent, 'models')} that does."
                )
            steps = tables[self.content["task"]]
        return tuple(map(tuple, steps))

    @property
    def seed(self) -> int | None:
        """Of the run; None where nobody tells."""
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
        """Label id → name, of all classes of the data set that the file tells of."""
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
        everything = {label for ids in self.schedule for label in ids}
        return self.confusion if everything <= self.channels.keys() else None

    @property
    def future(self) -> int:
        """What pixels of future classes counted as: 0, background, or 255, nothing."""
        if "protocol" in self.content:
            return self.content["protocol"]["future_classes"]
        test = self.config.get("data_loader", {}).get("args", {}).get("test", {})
        published = (data_set(self.dataset) or BaseDataset).future
        return test.get("args", {}).get("masking_value", published)

    @property
    def cropped(self) -> str | None:
        """What the evaluation made of the images, in words; of older files None."""
        return self.content.get("protocol", {}).get("images")

    def list_of(self, kind: str) -> dict[str, Any]:
        """What is told of the list of images "train" or "test", empty where nothing is."""
        return self.content.get("lists", {}).get(kind, {})

    @property
    def weights(self) -> Path | None:
        """Their file: of a step's own test the final checkpoint, wherever the run lies now."""
        if _is_step(self.file.parent):
            return final_checkpoint(beside(self.file.parent, "models"))
        told = self.content.get("weights")
        return Path(told) if told else None

    @property
    def global_batch(self) -> int | None:
        """Images of an iteration of its training; None where nobody tells."""
        return self.history.get("global_batch", self.base.get("global batch"))

    @property
    def memory(self) -> int:
        """Exemplars of the step."""
        told = self.content.get("memory", self._memory.get("mem_size", 0))
        return told if self.step > 0 else 0

    @property
    def _memory(self) -> dict[str, Any]:
        return self.config.get("data_loader", {}).get("args", {}).get("memory", {})

    @property
    def _task(self) -> dict[str, Any]:
        return self.config.get("data_loader", {}).get("args", {}).get("task", {})

    @property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Loss term → (epoch, mean), of the epochs that are told."""
        told: dict[str, list[tuple[int, float]]] = {}
        for epoch in self.history.get("epochs", []):
            for term, value in epoch.get("losses", {}).items():
                told.setdefault(term, []).append((epoch["epoch"], value))
        return told


@dataclass(frozen=True)
class Run:
    """The tested steps of one run.

    Attributes:
        folder: of its log.
        results: by step, ascending.
    """

    folder: Path
    results: dict[int, Result] = field(repr=False)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def last(self) -> Result:
        """Its last step."""
        return self.results[max(self.results)]


def beside(folder: Path, kind: str) -> Path:
    """The other folder of a step or a run: models/RUN/step_t and log/RUN/step_t lie side by side.

    Args:
        folder: below one of them.
        kind: which is wanted, "models" or "log".
    """
    other = {"models": "log", "log": "models"}[kind]
    for above in (folder, *folder.parents[:2]):
        if above.name == other:
            return above.with_name(kind) / folder.relative_to(above)
    return folder


def find_runs(paths: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs in folders: of a run, below models or log, of one of its steps, of many runs, or of
    the test of some weights that an evaluation made (`eval/WEIGHTS` below a step's log).

    Args:
        paths: of folders, or patterns of them.

    Returns:
        Runs by folder; and in words what holds no tested step.

    Raises:
        UserError: a folder does not exist, or no tested step is in any of them.
    """
    files: dict[Path, Path] = {}  # by where it really is: a folder may be named twice, or by a link
    empty = []
    for path in paths:
        folders = (
            [Path(path)] if Path(path).is_dir() else [Path(p) for p in sorted(glob.glob(path))]
        )
        if not folders:
            raise UserError(f"there is no folder {path}; name a run's, or one that holds runs.")
        for folder in (folder.absolute() for folder in folders):
            found = _tests(folder) or _tests(beside(folder, "log"))
            files |= {file.resolve(): file for file in found}
            empty += [] if found else [folder.name]
    if not files:
        raise UserError(
            f"{listing(paths)} holds no tested step, log/RUN/step_N/{METRICS}; train a step to its "
            "end, or evaluate weights and name the folder of the result."
        )
    runs: dict[Path, dict[int, Result]] = {}
    for file in files.values():
        step = file.parent
        result = read_result(file)
        runs.setdefault(step.parent if _is_step(step) else step, {})[result.step] = result
    told = [f"No tested step (yet): {listing(empty, 8)}."] if empty else []
    return [
        Run(folder, dict(sorted(steps.items()))) for folder, steps in sorted(runs.items())
    ], told


def _tests(folder: Path) -> list[Path]:
    """The `metrics.json` of a folder, or those of the steps below it, through links as well."""
    if (folder / METRICS).is_file():
        return [folder / METRICS]
    found, entered = [], set()
    for where, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in entered:
            names.clear()  # a link that leads back
            continue
        entered.add(real)
        if METRICS in files and _is_step(Path(where)):
            found.append(Path(where, METRICS))
    return sorted(found)


def _is_step(folder: Path) -> bool:
    return re.fullmatch(r"step_\d+", folder.name) is not None


def read_result(file: Path) -> Result:
    """The test of a step.

    Raises:
        UserError: the file is no `metrics.json` of a test.
    """
    content = _read(file)
    needed = ("dataset", "task", "setting", "step", "name", "method", "classes", "confusion")
    missing = [key for key in needed if key not in content]
    if missing:
        raise UserError(f"{file} is no report of a test: it has no '{missing[0]}'.")
    if content.get("split", "test") != "test":
        raise UserError(f"{file} is of a validation, which sees the labels of new classes alone.")
    weights = Path(content.get("weights") or ".")  # beside which a config lies that is no step's
    folders = (beside(file.parent, "models"), *([] if _is_step(file.parent) else [weights.parent]))
    configs = [folder / "config.json" for folder in folders]
    config = next((path for path in configs if path.is_file()), None)
    history, base = file.parent / HISTORY, folders[0] / BASE
    return Result(
        file,
        content,
        _read(config) if config else {},
        _read(history) if history.is_file() else {},
        _read(base)["record"]["settings"] if base.is_file() else {},
        _passes(file.parent / PASSES, content),
    )


def fingerprint(content: Mapping[str, Any]) -> str:
    """Of the matrix of a test, by which further passes of the same weights are known."""
    return hashlib.sha256(json.dumps(content["confusion"]).encode()).hexdigest()[:16]


def _passes(file: Path, content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The further passes that `scripts/protocol.py` wrote for this test; none of another one."""
    written = _read(file) if file.is_file() else {}
    if written.get("of") != fingerprint(content):
        return {}
    return {words: np.array(wide, dtype=np.int64) for words, wide in written["passes"].items()}


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file, "file")
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object.")
    return content


def labels_of(schedule: Schedule) -> list[int]:
    """All label ids of a schedule, in order of arrival."""
    return [label for ids in schedule for label in ids]
