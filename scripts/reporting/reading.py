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
from scripts.reporting.results import TASK, Result, beside, is_step
from trainer.results import PASSES, WEIGHTS
from trainer.shared_step import FILE as BASE
from utils.config_file import flatten, read_json
from utils.errors import UserError
from utils.forms import fault
from utils.history import FILE as HISTORY
from utils.history import read_history

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
    weights = Path(content.get("weights") or ".")  # beside which a config lies that is no step's
    folders = (beside(file.parent, "models"), *([] if is_step(file.parent) else [weights.parent]))
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
    for words in contradictions(result):
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
