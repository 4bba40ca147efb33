"""The tests of runs as their `metrics.json` tell them, found below folders and put in order.

A file is judged where it is read, by its form (`forms.py`) and by what follows from its matrices;
everything else relies on that.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset
from data_loader import data_set
from scripts.reporting import forms
from trainer.record import differ
from trainer.results import METRICS, PASSES, PREVIOUS, WEIGHTS
from trainer.shared_step import FILE as BASE
from utils.checkpoint import epoch_file, final_checkpoint, hash_of
from utils.config_file import flatten, read_json
from utils.errors import UserError, listing
from utils.forms import fault
from utils.history import FILE as HISTORY
from utils.history import read_history
from utils.labels import BACKGROUND
from utils.logger import progress
from utils.metric import EVALUATORS, Evaluator, class_accuracy, class_iou, merge_future
from utils.metric import METRICS as METRIC_FUNCTIONS

LARGEST_FILE = 64 << 20  # bytes; the matrices of a test of 2,000 classes come to half of it
Schedule = tuple[tuple[int, ...], ...]  # label ids of each step
TASK = "data_loader.args.task"
# Keys of a step's own test that say which row of a table it is, as its config has them.
KINDS = {
    "method": "method",
    "joint": f"{TASK}.joint",
    "memory": "data_loader.args.memory.mem_size",
}


@dataclass(frozen=True)
class Result:
    """The test of a step.

    Attributes:
        file: its `metrics.json`.
        content: what that holds.
        config: of the step, by dotted key; empty where it is not found.
        history: what training the step brought and cost, empty where nobody wrote it.
        base: of a step 0 that was taken with `--base`, what decided its weights, else empty.
        passes: further passes over the test images (`scripts/protocol.py`), in words → the wide
            confusion matrix of each.
        damaged: what beside it is damaged and therefore empty here: name of the file → why.
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
        """Label ids of each step; of files older than the key, from the config or the tables."""
        steps = self.content.get("steps", self.config.get(f"{TASK}.steps"))
        if steps is None:
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
    def lost_batch(self) -> bool:
        """Whether the file that told `global_batch` is damaged."""
        return self.global_batch is None and bool({HISTORY, BASE} & self.damaged.keys())

    @property
    def memory(self) -> int:
        """Exemplars of the step."""
        told = self.content.get("memory", self.config.get(KINDS["memory"], 0))
        return told if self.step > 0 else 0

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
        Runs by folder; and in words what is left out: folders without a tested step, runs with a
        damaged test, damaged files beside the others.

    Raises:
        UserError: a folder does not exist, or no tested step is in any of them that can be used.
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
    tests: dict[Path, dict[int, Result]] = {}
    faults: dict[Path, str] = {}  # of a run, the first
    for file in files.values():
        run = file.parent.parent if _is_step(file.parent) else file.parent
        try:
            result = read_result(file)
        except UserError as error:
            faults.setdefault(run, str(error))
            continue
        tests.setdefault(run, {})[result.step] = result
    for run, steps in progress(tests.items(), desc="compare tests and weights", unit="run"):
        if run not in faults and (words := _disagreement(steps) or _of_other_weights(steps)):
            faults[run] = words
    runs = [Run(run, dict(sorted(tests[run].items()))) for run in sorted({*tests} - {*faults})]
    if not runs:
        first, *others = faults.values()
        head = f"no run is left, {len(faults)} are damaged; the first: " if others else ""
        raise UserError(head + first)
    left = [f"No tested step (yet): {listing(empty, 8)}."] if empty else []
    left += [f"{run.name} is left out: {words}" for run, words in sorted(faults.items())]
    left += [
        f"Left out: {words}"
        for run in runs
        for result in run.results.values()
        for words in result.damaged.values()
    ]
    return runs, left


def _disagreement(steps: Mapping[int, Result]) -> str | None:
    """In what the tests of a run are not of the same task, in words."""
    told: dict[str, tuple[object, Result]] = {}
    for result in steps.values():
        facts = {
            "the data set": result.dataset,
            "the setting": result.content["setting"],
            "the task": result.content["task"],
            "the steps": list(map(list, result.schedule)),
            "joint training": result.joint,
        } | {f"label id {label}": name for label, name in result.names.items()}
        for what, value in facts.items():
            other, first = told.setdefault(what, (value, result))
            if other != value:
                return f"{what} is {other} in {first.file} and {value} in {result.file}."
    return None


def _of_other_weights(steps: Mapping[int, Result]) -> str | None:
    """Which test of a run is not of the weights that now lie there, or of another previous step."""
    for step, result in steps.items():
        again = "call that step again with -r auto, which tests what is there"
        weights, tested = result.weights, result.content.get(WEIGHTS)
        if _is_step(result.file.parent) and weights is not None:
            epoch = result.content.get("epoch")
            if tested is None and epoch is not None and weights.name != epoch_file(epoch):
                return f"{result.file} is of epoch {epoch}, but there lies {weights}; {again}."
            try:
                if tested is not None and hash_of(weights) != tested:
                    return f"{result.file} is of other weights than {weights}; {again}."
            except UserError as error:
                result.damaged[weights.name] = str(error)
        before = steps[step - 1].content.get(WEIGHTS) if step - 1 in steps else None
        if differ(result.content.get(PREVIOUS), before):
            return (
                f"the weights of {result.file} were trained from other weights of step {step - 1} "
                f"than those that {steps[step - 1].file} is of; train step {step} anew as well."
            )
    return None


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
        if METRICS in files and _is_step(Path(where)) and os.path.isfile(Path(where, METRICS)):
            found.append(Path(where, METRICS))
    return sorted(found)


def _is_step(folder: Path) -> bool:
    return re.fullmatch(r"step_\d+", folder.name) is not None


def read_result(file: Path) -> Result:
    """The test of a step.

    Raises:
        UserError: the file is no `metrics.json` of a test, or it or the config of the step is
            damaged.
    """
    try:
        content = _read(file, forms.METRICS)
    except UserError as error:
        raise _damaged(str(error)) from None
    if content.get("split", "test") != "test":
        raise UserError(f"{file} is of a validation, which sees the labels of new classes alone.")
    weights = Path(content.get("weights") or ".")  # beside which a config lies that is no step's
    folders = (beside(file.parent, "models"), *([] if _is_step(file.parent) else [weights.parent]))
    configs = [folder / "config.json" for folder in folders]
    config = next((path for path in configs if os.path.isfile(path)), None)
    damaged: dict[str, str] = {}

    def spared(path: Path, reader: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What a file holds that decides no figure of the test."""
        try:
            return reader(path) if os.path.isfile(path) else {}
        except UserError as error:
            damaged[path.name] = str(error)
            return {}

    result = Result(
        file,
        content,
        _config(config) if config else {},
        spared(file.parent / HISTORY, _history),
        spared(folders[0] / BASE, lambda path: _read(path, forms.BASE)["record"]["settings"]),
        damaged=damaged,
    )
    for words in _contradictions(result):
        raise _damaged(f"{file} contradicts itself: {words}")
    result.passes.update(spared(file.parent / PASSES, lambda path: _passes(path, result)))
    return result


def _damaged(words: str) -> UserError:
    return UserError(f"{words.rstrip('.')}; delete it and test the weights anew (-r auto).")


def _config(file: Path) -> dict[str, Any]:
    """The config of a step, by dotted key; keys of other versions are left out."""
    values, _ = flatten(read_json(file), str(file), strict=False)
    steps = values.get(f"{TASK}.steps")
    if steps is not None and (words := fault(steps, forms.SCHEDULE, f"{TASK}.steps")):
        raise UserError(f"{file}: {words}.")
    return values


def _history(file: Path) -> dict[str, Any]:
    content = read_history(file)
    if words := fault(content, forms.COSTS):
        raise UserError(f"{file}: {words}.")
    return content


def _read(file: Path, form: object) -> dict[str, Any]:
    """The content of a JSON file that is of a form.

    Raises:
        UserError: it is not, it is too large or cannot be read.
    """
    if os.path.isfile(file) and os.path.getsize(file) > LARGEST_FILE:
        raise UserError(f"{file} has more than {LARGEST_FILE >> 20} MiB.")
    content = read_json(file, "file")
    if words := fault(content, form):
        raise UserError(f"{file}: {words}.")
    return content


def _contradictions(result: Result) -> Iterator[str]:
    """What cannot be in a test, though every key of it is of its form.

    Each check relies on those before it: only the first contradiction can be trusted.
    """
    content, step = result.content, result.step
    rows, unseen = content["classes"], content.get("future_classes", [])
    if _is_step(result.file.parent) and result.file.parent.name != f"step_{step}":
        yield f"its step is {step}, but it lies in {result.file.parent.name}"
    size = len(content["confusion"])
    if not rows or size - len(rows) not in (0, 1):
        yield f"confusion has {size} rows for {len(rows)} classes"
    for name in (name for name in ("confusion", "wide") if name in content):
        if any(len(row) != size for row in content[name]):
            yield f"a row of {name} has not {size} columns"
        if sum(map(sum, content[name])) > forms.MOST_PIXELS:
            yield f"{name} counts more than {forms.MOST_PIXELS} pixels"
    labels = [row["label_id"] for row in (*rows, *unseen)]
    if len({*labels}) < len(labels):
        yield "a label id of its classes is there twice"
    if result.background and labels[0] != BACKGROUND:
        yield f"background comes first, but the label id there is {labels[0]}"
    if result.background != content.get("protocol", {}).get("background", result.background):
        yield f"{size} rows for {len(rows)} classes is not what its protocol says of background"
    schedule = result.schedule
    if not all(schedule) or len({*labels_of(schedule)}) < len(labels_of(schedule)):
        yield "a step without classes, or a label id twice in its steps"
    if step >= len(schedule):
        yield f"its step is {step}, but there are {len(schedule)}"
    if [*result.channels][result.background :] != labels_of(schedule[: step + 1]):
        yield f"its classes are not those of the steps up to {step}"
    counted = result.confusion.sum(axis=1)[0 if result.background else 1 :]
    if "wide" in content:
        wide = result.wide
        assert wide is not None
        if len(wide) < size or ("future_classes" in content and len(wide) != size + len(unseen)):
            yield f"wide has {len(wide)} rows for {len(rows)} classes and {len(unseen)} unseen"
        if not np.array_equal(merge_future(wide, result.future), result.confusion):
            yield "confusion is not what wide gives"
        rows = [*rows, *unseen]
        counted = np.concatenate([counted, wide[size:].sum(axis=1)])
    for row, pixels in zip(rows, counted.tolist(), strict=False):
        if row.get("pixels", pixels) != pixels:
            yield f"label id {row['label_id']} has {row['pixels']} pixels, but {pixels} are counted"
    yield from _other_figures(result)
    for key, dotted in KINDS.items():
        config = result.config.get(dotted)
        if _is_step(result.file.parent) and config not in (None, content.get(key, config)):
            yield f"{key} is {content[key]}, but {config} in the config of the step"


def _other_figures(result: Result) -> Iterator[str]:
    """Figures in a test that do not follow from its confusion matrix."""
    first = 0 if result.background else 1
    by_class = {"IoU": class_iou(result.confusion), "accuracy": class_accuracy(result.confusion)}
    for key, values in by_class.items():
        for row, value in zip(result.content["classes"], values[first:].tolist(), strict=True):
            if not _is_close(row.get(key, value), value):
                yield f"{key} of label id {row['label_id']} is {row[key]}, but {value} is counted"
    old = range(first, 1 + len(result.schedule[0]))
    new = range(old.stop, len(result.confusion))
    make = EVALUATORS.get(result.config.get("evaluator.type", ""), Evaluator)
    stored = result.content.get("metrics", {})
    computed = make([name for name in METRIC_FUNCTIONS if name in stored], old, new)
    for name, groups in computed.evaluate(result.confusion).items():
        for group, value in stored[name].items():
            if group not in groups or not _is_close(value, groups[group]):
                yield f"{name} of {group} is {value}, but {groups.get(group)} is counted"


def _is_close(stored: float, computed: float) -> bool:
    """But for the rounding of sums in another order."""
    return math.isclose(stored, computed, rel_tol=0, abs_tol=1e-6)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint(content: Mapping[str, Any]) -> str:
    """Of a test, by which further passes of the same weights over the same data are known."""
    told = [content[WEIGHTS]] if WEIGHTS in content else []
    contents = content.get("lists", {}).get("test", {}).get("contents")
    told += [contents] if contents is not None else []
    return _digest([content["confusion"], *told] if told else content["confusion"])


def passes_json(result: Result, passes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The content of a `protocol.json`: further passes of a test, which `read_result` reads."""
    counts = {words: wide.tolist() for words, wide in passes.items()}
    return {"of": fingerprint(result.content), "checksum": _digest(counts), "passes": counts}


def _passes(file: Path, result: Result) -> dict[str, np.ndarray]:
    """The further passes of a test.

    Raises:
        UserError: the file is damaged, or of another test.
    """
    written = _read(file, forms.PASSES)
    if written["of"] != fingerprint(result.content):
        raise UserError(f"{file} is of another test than {result.file}.")
    if written.get("checksum", digest := _digest(written["passes"])) != digest:
        raise UserError(f"{file}: the passes are not those that were written.")
    size = len(result.confusion)
    rows = size if result.wide is None else len(result.wide)
    for words, counts in written["passes"].items():
        if not forms.WORDS.accepts(words):
            raise UserError(f"{file}: the name of a pass must be {forms.WORDS.expected()}.")
        if len(counts) != rows or any(len(row) != size for row in counts):
            raise UserError(f"{file}: '{words}' is no matrix of {rows} × {size} counts.")
        if sum(map(sum, counts)) > forms.MOST_PIXELS:
            raise UserError(f"{file}: '{words}' counts more than {forms.MOST_PIXELS} pixels.")
    return {words: np.array(wide, dtype=np.int64) for words, wide in written["passes"].items()}


def labels_of(schedule: Schedule) -> list[int]:
    """All label ids of a schedule, in order of arrival."""
    return [label for ids in schedule for label in ids]
