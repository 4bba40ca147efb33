"""Shared base steps: take another run's finished step 0 instead of training the same one again.

15-5, 15-1 and 15-1's other orders of later classes start from the same step 0, and so do a run with
memory and one without. Called by `trainer/run.py` for `--base`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_loader.data_loaders import IncrementalDataLoader
from trainer.advice import base_of_family
from trainer.methods import METHODS
from trainer.record import differences, record, remarks
from trainer.results import retire
from utils import checkpoint as files
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import write_json
from utils.logger import log
from utils.parse_config import ConfigParser

FILE = "base.json"  # in the folder of a step that was taken


def check_base(config: ConfigParser, base: Path, data: IncrementalDataLoader) -> None:
    """Whether the step in `base`, the folder of `--base`, is the one that this run would train.

    Raises:
        UserError: lists everything that differs and decides the weights.
    """
    if data.task.step != 0:
        raise UserError(
            f"--base takes another run's step 0, but this is step {data.task.step}; give it with "
            "--task_step 0, then train the later steps without it."
        )
    if config.resume is not None:
        raise UserError("--base and -r exclude each other: one starts a run, one continues it.")
    if base.resolve() == config.step_dir().resolve():
        raise UserError(f"--base {base} is this run's own folder; leave it out.")
    path, theirs = _finished_step(base)
    _compare(path, record(config, data, None), theirs)


def adopt(config: ConfigParser, base: Path, ranks: Ranks, data: IncrementalDataLoader) -> Path:
    """Link the finished step in `base` into this run's folder, after comparing the data as well.

    Returns:
        Its checkpoint there.

    Raises:
        UserError: as `check_base`.
    """
    path, theirs = _finished_step(base)
    data.setup("train")
    if ranks.is_main:
        mine = record(config, data, data.train_hash())
        _compare(path, mine, theirs)
        retire(config.log_dir(), trained_anew=True)
        retire(config.step_dir(), trained_anew=True)
        for remark in remarks(mine, theirs):
            log.info("the base step comes from another %s", remark)
        folder = config.step_dir()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.as_dict())
        write_json(folder / FILE, {"checkpoint": str(path.resolve()), "record": theirs})
        files.keep(path, path.name, folder)
        log.info("step 0 is taken from %s: everything that decides its weights is equal", path)
    ranks.barrier()
    return config.step_dir() / path.name


def _finished_step(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = files.final_checkpoint(folder)
    if path is None:
        raise UserError(
            f"--base {folder} holds no checkpoint-epoch*.pth; name the step_0 folder of a finished "
            "run, such as SAVE_DIR/models/overlap_15-5_DKD/step_0."
        )
    checkpoint = files.load(path)
    if not checkpoint.get("finished", False) or "record" not in checkpoint:
        raise UserError(
            f"--base: {path} is not of a finished step with a record of its settings, so nobody "
            "can tell whether it is the step this run would train."
        )
    return path, checkpoint["record"]


def _compare(path: Path, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    differs = differences(mine, theirs)
    if differs:
        method, other = (each["settings"]["method"] for each in (mine, theirs))
        if method != other:
            differs.append(_way(method, other))
        raise UserError(
            f"--base: {path} is another step 0 than this run would train: {'; '.join(differs)}."
        )


def _way(method: str, other: str) -> str:
    """How a method gets to its step 0 where that of another one is there."""
    if other not in METHODS:
        return f"this version has no method '{other}'"
    family = METHODS[other].family
    if family != METHODS[method].family:
        return base_of_family(family, method)
    return (
        f"a step 0 of '{other}' is taken with --method {other}; '{method}' is of the same family "
        f"and goes on from there: call the later steps with --method {method}"
    )
