"""A shared step 0: taken over from another run's folder (`--base`) instead of trained again.

15-5, 15-1 and 15-1's other orders of later classes start from the same step 0, and so do a run with
memory and one without.
"""

from __future__ import annotations

from typing import Any

from base.task import Task
from data_loader.data_loaders import IncrementalDataLoader
from trainer.advice import base_of_family
from trainer.methods import METHODS
from trainer.provenance import differences, record, remarks
from trainer.results import retire
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.errors import UserError
from utils.files import write_json
from utils.logger import log
from utils.parse_config import ConfigParser
from utils.ranks import Ranks

FILE = "base.json"  # in the folder of a step that was taken over


def find_shared(config: ConfigParser, task: Task) -> StoredCheckpoint:
    """The finished step in the folder of `--base`.

    Raises:
        UserError: there is none, or this call cannot take it.
    """
    folder = config.call.base
    assert folder is not None
    if task.step != 0:
        raise UserError(
            f"--base takes another run's step 0, but this is step {task.step}; give it with "
            "--task_step 0, then train the later steps without it."
        )
    if config.call.resume is not None:
        raise UserError("--base and -r exclude each other: one starts a run, one continues it.")
    if folder.resolve() == config.step_dir().resolve():
        raise UserError(f"--base {folder} is this run's own folder; leave it out.")
    path = files.final_checkpoint(folder)
    if path is None:
        raise UserError(
            f"--base {folder} holds no checkpoint-epoch*.pth; name the step_0 folder of a finished "
            "run, such as SAVE_DIR/models/overlap_15-5_DKD/step_0."
        )
    stored = StoredCheckpoint(path)
    if not stored.content.get("finished", False) or "record" not in stored.content:
        raise UserError(
            f"--base: {path} is not of a finished step with a record of its settings, so nobody "
            "can tell whether it is the step this run would train."
        )
    return stored


def check_shared(
    config: ConfigParser,
    stored: StoredCheckpoint,
    data: IncrementalDataLoader,
    train_hash: str | None = None,
) -> dict[str, Any]:
    """Whether another run's step 0 is the one that this run would train; gives this run's record.

    Args:
        config, data: of this run.
        stored: of `find_shared`.
        train_hash: of the data, None while they are not to be compared.

    Raises:
        UserError: lists everything that differs and decides the weights.
    """
    this, other = record(config, data, train_hash), stored.content["record"]
    differs = differences(this, other)
    if differs:
        methods = [each["settings"]["method"] for each in (this, other)]
        if methods[0] != methods[1]:
            differs.append(_way(*methods))
        raise UserError(
            f"--base: {stored.path} is another step 0 than this run would train: "
            f"{'; '.join(differs)}."
        )
    return this


def adopt(
    config: ConfigParser, ranks: Ranks, stored: StoredCheckpoint, data: IncrementalDataLoader
) -> StoredCheckpoint:
    """Link another run's step 0 into this run's folder, after comparing the data as well.

    Returns:
        Its checkpoint there.

    Raises:
        UserError: as `check_shared`.
    """
    data.setup("train")
    if ranks.is_main:
        this = check_shared(config, stored, data, data.train_hash())
        other, folder = stored.content["record"], config.step_dir()
        retire(config.log_dir(), trained_anew=True)
        retire(folder, trained_anew=True)
        for remark in remarks(this, other):
            log.info("the base step comes from another %s", remark)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.as_dict())
        write_json(folder / FILE, {"checkpoint": str(stored.path.resolve()), "record": other})
        files.keep(stored.path, stored.path.name, folder)
        log.info(
            "step 0 is taken from %s: everything that decides its weights is equal", stored.path
        )
    ranks.barrier()
    return stored.at(config.step_dir() / stored.path.name)


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
