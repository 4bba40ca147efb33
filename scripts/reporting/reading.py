"""A test read from its files, each judged where it is read: everything else relies on that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.reporting import forms
from scripts.reporting.consistency import contradictions
from scripts.reporting.results import TASK, Result
from trainer.results import PASSES, WEIGHTS
from trainer.shared_step import FILE as BASE
from utils.config_file import flatten, read_json
from utils.errors import UserError
from utils.forms import fault
from utils.history import FILE as HISTORY
from utils.history import read_history
from utils.run_folder import MODELS, counterpart, is_step

LARGEST_FILE = 64 << 20  # bytes; the matrices of a test of 2,000 classes come to half of it


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
    models, damaged = counterpart(file.parent, MODELS), {}

    def unless_damaged(path: Path, reader: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The content of a file that decides no figure of the test."""
        try:
            return reader(path) if os.path.isfile(path) else {}
        except UserError as error:
            damaged[path.name] = str(error)
            return {}

    result = Result(
        file,
        content,
        _config(file, models, content),
        history=unless_damaged(file.parent / HISTORY, _history),
        base=unless_damaged(models / BASE, _base),
        damaged=damaged,
    )
    for text in contradictions(result):
        raise _damaged(f"{file} contradicts itself: {text}")
    result.passes.update(unless_damaged(file.parent / PASSES, lambda path: _passes(path, result)))
    return result


def _damaged(text: str) -> UserError:
    return UserError(f"{text.rstrip('.')}; delete it and test the weights anew (-r auto).")


def _read(file: Path, form: object) -> dict[str, Any]:
    """The content of a JSON file that is of a form and not too large."""
    if os.path.isfile(file) and os.path.getsize(file) > LARGEST_FILE:
        raise UserError(f"{file} has more than {LARGEST_FILE >> 20} MiB.")
    return _judged(file, read_json(file, "file"), form)


def _judged(file: Path, content: Any, form: object, name: str = "") -> Any:
    if text := fault(content, form, name):
        raise UserError(f"{file}: {text}.")
    return content


def _config(file: Path, models: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a step, by dotted key; without the keys of other versions.

    It lies in the step's folder; of a test that is no step's own, also beside the weights.
    """
    folders = [models]
    if not is_step(file.parent):
        folders.append(Path(content.get("weights") or ".").parent)
    for path in (folder / "config.json" for folder in folders):
        if os.path.isfile(path):
            values, _ = flatten(read_json(path), str(path), strict=False)
            if (steps := f"{TASK}.steps") in values and values[steps] is not None:
                _judged(path, values[steps], forms.SCHEDULE, steps)
            return values
    return {}


def _history(file: Path) -> dict[str, Any]:
    return _judged(file, read_history(file), forms.COSTS)


def _base(file: Path) -> dict[str, Any]:
    return _read(file, forms.BASE)["record"]["settings"]


# ---------------------------------------------------------------- further passes over test images
def fingerprint(content: Mapping[str, Any]) -> str:
    """Of a test: passes of the same weights over the same data hold it."""
    contents = content.get("lists", {}).get("test", {}).get("contents")
    of_inputs = [value for value in (content.get(WEIGHTS), contents) if value is not None]
    return _digest([content["confusion"], *of_inputs] if of_inputs else content["confusion"])


def passes_json(result: Result, passes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The content of a `protocol.json`, the further passes of a test, which `read_result` reads."""
    counts = {name: wide.tolist() for name, wide in passes.items()}
    return {"of": fingerprint(result.content), "checksum": _digest(counts), "passes": counts}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _passes(file: Path, result: Result) -> dict[str, np.ndarray]:
    written = _read(file, forms.PASSES)
    if written["of"] != fingerprint(result.content):
        raise UserError(f"{file} is of another test than {result.file}.")
    if written.get("checksum", digest := _digest(written["passes"])) != digest:
        raise UserError(f"{file}: the passes are not those that were written.")
    size = len(result.confusion)
    rows = size if result.wide is None else len(result.wide)
    for name, counts in written["passes"].items():
        if not forms.PRINTABLE.accepts(name):
            raise UserError(f"{file}: the name of a pass must be {forms.PRINTABLE.expected()}.")
        if len(counts) != rows or any(len(row) != size for row in counts):
            raise UserError(f"{file}: '{name}' is no matrix of {rows} × {size} counts.")
        if sum(map(sum, counts)) > forms.MOST_PIXELS:
            raise UserError(f"{file}: '{name}' counts more than {forms.MOST_PIXELS} pixels.")
    return {name: np.array(wide, dtype=np.int64) for name, wide in written["passes"].items()}
