"""The runs in folders: their tests found, put in order, and compared with the weights there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.reporting.reading import read_result
from scripts.reporting.results import Result, Run
from trainer.provenance import differ
from trainer.results import METRICS, PREVIOUS, WEIGHTS
from utils.checkpoint import epoch_file, hash_of
from utils.errors import UserError, listing
from utils.logger import progress
from utils.run_folder import LOG, counterpart, is_step


def find_runs(paths: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs in folders: of a run, below models or log, of one of its steps, of many runs, or of
    the test of some weights that an evaluation made (`eval/WEIGHTS` below a step's log).

    Args:
        paths: of folders, or patterns of them.

    Returns:
        Runs by folder; and a sentence for what is left out: folders without a tested step, runs
        with a damaged test, damaged files beside the others.

    Raises:
        UserError: a folder does not exist, or no tested step is in any of them that can be used.
    """
    files, empty = _find_tests(paths)
    tests: dict[Path, dict[int, Result]] = {}
    faults: dict[Path, str] = {}  # of a run, the first
    for file in files:
        run = file.parent.parent if is_step(file.parent) else file.parent
        try:
            result = read_result(file)
        except UserError as error:
            faults.setdefault(run, str(error))
        else:
            tests.setdefault(run, {})[result.step] = result
    for run, steps in progress(tests.items(), desc="compare tests and weights", unit="run"):
        if run not in faults and (text := _disagreement(steps) or _of_other_weights(steps)):
            faults[run] = text
    runs = [Run(run, dict(sorted(tests[run].items()))) for run in sorted({*tests} - {*faults})]
    if not runs:
        first, *others = faults.values()
        head = f"no run is left, {len(faults)} are damaged; the first: " if others else ""
        raise UserError(head + first)
    left_out = [f"No tested step (yet): {listing(empty, 8)}."] if empty else []
    left_out += [f"{run.name} is left out: {text}" for run, text in sorted(faults.items())]
    damaged = (result.damaged for run in runs for result in run.results.values())
    left_out += [f"Left out: {text}" for files in damaged for text in files.values()]
    return runs, left_out


def _find_tests(paths: Iterable[str]) -> tuple[Iterable[Path], list[str]]:
    """The `metrics.json` in folders, and the names of folders that hold none."""
    files: dict[Path, Path] = {}  # by where it really is: a folder may be named twice, or by a link
    empty = []
    for path in paths:
        folders = [path] if os.path.isdir(path) else sorted(glob.glob(path))
        if not folders:
            raise UserError(f"there is no folder {path}; name a run's, or one that holds runs.")
        for folder in (Path(folder).absolute() for folder in folders):
            tests = _tests_below(folder) or _tests_below(counterpart(folder, LOG))
            files |= {file.resolve(): file for file in tests}
            empty += [] if tests else [folder.name]
    if not files:
        raise UserError(
            f"{listing(paths)} holds no tested step, log/RUN/step_N/{METRICS}; train a step to its "
            "end, or evaluate weights and name the folder of the result."
        )
    return files.values(), empty


def _tests_below(folder: Path) -> list[Path]:
    """The `metrics.json` of a folder, or those of the steps below it, through links as well."""
    if (folder / METRICS).is_file():
        return [folder / METRICS]
    tests, entered = [], set()
    for path, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in entered:
            subfolders.clear()  # a link that leads back
            continue
        entered.add(real)
        if METRICS in files and is_step(Path(path)) and os.path.isfile(Path(path, METRICS)):
            tests.append(Path(path, METRICS))
    return sorted(tests)


def _disagreement(steps: Mapping[int, Result]) -> str | None:
    """In what the tests of a run are not of the same task."""
    seen: dict[str, tuple[object, Result]] = {}
    for result in steps.values():
        facts = {
            "the data set": result.dataset,
            "the setting": result.content["setting"],
            "the task": result.content["task"],
            "the steps": list(map(list, result.schedule)),
            "joint training": result.joint,
        } | {f"label id {label}": name for label, name in result.names.items()}
        for what, value in facts.items():
            other, first = seen.setdefault(what, (value, result))
            if other != value:
                return f"{what} is {other} in {first.file} and {value} in {result.file}."
    return None


def _of_other_weights(steps: Mapping[int, Result]) -> str | None:
    """Which test of a run is not of the weights that now lie there, or of another previous step."""
    for step, result in steps.items():
        again = "call that step again with -r auto, which tests what is there"
        weights, tested = result.weights, result.content.get(WEIGHTS)
        if is_step(result.file.parent) and weights is not None:
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
