"""How a step starts, decided once: afresh, from a checkpoint, from another run's base step, only
tested, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.task import Task
from trainer.advice import around_finished
from trainer.build import build_data
from trainer.checks import check, check_room, check_training, checkpoint_size
from trainer.record import EPOCHS, LENGTHENED, differ, differences, record
from trainer.results import METRICS, tested_weights
from utils import checkpoint as files
from utils.distributed import Launch, Ranks
from utils.errors import UserError
from utils.parse_config import ConfigParser


@dataclass(frozen=True)
class Start:
    """What is to be done for a step.

    Attributes:
        config: of the step. `resume` names the checkpoint to go on from, or with `test` the
            weights to test; `base` the step to take over; with none of them it starts afresh.
        weights: to test, those of `resume` or the step's own; None: the step is to be trained.
    """

    config: ConfigParser
    weights: Path | None


def decide(config: ConfigParser, plan: Launch) -> Start | None:
    """How the step starts; None when nothing is left to do.

    Args:
        config: of the step.
        plan: which processes will run it.

    Raises:
        UserError: as `checks.check`; or the step is finished, but with other settings than these.
    """
    config = _with_batch(config, plan)
    if config.auto and not config.test:
        left = _resolve_auto(config, plan)
        if left is None:
            return None
        config = left
    return Start(config, check(config, plan))


def check_later(steps: Sequence[ConfigParser], plan: Launch) -> None:
    """Look at the steps that follow the first of a launch, as far as can be said before it is done.

    Args:
        steps: in order, without the first.
        plan: which processes will run them.

    Raises:
        UserError: what is wrong with a step: settings, images, a run of other settings in its
            folder, too little room for the checkpoints of all.
    """
    room = 0
    for config in (config for config in steps if not config.test):
        config = _with_batch(config, plan)
        data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
        check_training(config, data)
        alone = build_data(config, Ranks(0, 1, plan.devices[0]))  # the others are not there yet
        alone.setup("train", "val", "test")
        memory, images = data.memory_policy, len(alone.train_set)
        replayed = memory["mem_size"] if memory["mix"] == "concat" else 0
        if images + replayed < data.global_batch:
            raise UserError(
                f"the training set of step {data.task.step} has {images} images, fewer than one "
                f"batch: {data.batch_words()}; choose a smaller one."
            )
        path, checkpoint, _ = files.newest_good(config.step_dir())
        if path is None:
            room += checkpoint_size(config, data.task)
        elif "record" in checkpoint:
            check_same_run(config, data.task, path, record(config, data, None), checkpoint)
        files.forget(go_on=True)
    if room:
        check_room(steps[-1].step_dir(), room, "the checkpoints of the later steps need")


def _with_batch(config: ConfigParser, plan: Launch) -> ConfigParser:
    """The configuration with the recipe's global batch shared out among the processes."""
    if config.global_batch is None:
        return config
    each = plan.world * config["trainer"]["accumulate"]
    batch = max(1, config.global_batch // each)
    return config.with_values({"data_loader.args.train.batch_size": batch})


def _resolve_auto(config: ConfigParser, plan: Launch) -> ConfigParser | None:
    """What `-r auto` means for this step: continue, test, start anew, or (None) nothing is left."""
    folder = config.step_dir()
    path, checkpoint, skipped = files.newest_good(folder)
    if path is None:
        return config.changed(notes=(*skipped, "-r auto: no checkpoint yet, a fresh start"))
    if not checkpoint.get("finished", True):
        return config.changed(resume=path, notes=(*skipped, f"-r auto: {path}"))
    if "record" in checkpoint:
        data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
        check_same_run(config, data.task, path, record(config, data, None), checkpoint)
    previous = previous_weights(config)
    if differ(previous, checkpoint.get("previous")):
        raise UserError(f"{folder} holds a finished step, but {of_other_previous(config)}")
    weights, metrics = files.final_checkpoint(folder) or path, config.log_dir() / METRICS
    if not metrics.is_file():
        why = "the step is trained, its test is left"
    elif tested_weights(metrics) != files.hash_of(weights):
        why = (
            f"the step is trained, its test is left: {metrics} does not name the weights {weights}"
        )
    else:
        print(f"{folder} is finished, see {metrics}: nothing to do")
        return None
    return config.changed(test=True, notes=(*skipped, f"-r auto: {why}"))


def check_same_run(
    config: ConfigParser,
    task: Task,
    path: Path,
    here: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
) -> None:
    """Whether the step of a checkpoint is the one that a configuration asks for.

    Args:
        config, task: of the step.
        path: of the checkpoint.
        here: record of the configuration.

    Raises:
        UserError: it is another one.
    """
    folder, there = config.step_dir(), checkpoint["record"]
    finished = checkpoint.get("finished", True)
    state = "a finished step" if finished else "an unfinished step"
    differs = differences(here, there, ignore=(EPOCHS, LENGTHENED))
    epochs = here["settings"][EPOCHS]
    trained = there["settings"].get(EPOCHS, epochs)
    if not differs and epochs == trained:
        return
    around = around_finished(config, task) if finished else ""
    if differs:
        raise UserError(
            f"{folder} holds {state} of another run: {'; '.join(differs)}; give the same, or "
            f"another --name for a new run{around}."
        )
    ways = f"give --epochs {trained}, or train {epochs} epochs anew under another --name{around}"
    if epochs > trained and finished:
        ways += (
            f"; -r {path} --epochs {epochs} lengthens the step, with a learning rate that rises "
            "again where the epochs of before had brought it down"
        )
    raise UserError(
        f"{folder} holds {state} of {trained} epochs, but trainer.epochs (--epochs) is {epochs}; "
        f"{ways}."
    )


def previous_weights(config: ConfigParser) -> str | None:
    """Hash of the weights that this step starts from; None at step 0 or where they are gone."""
    task = config["data_loader"]["args"]["task"]
    if task["step"] == 0 or task["joint"]:
        return None
    path = files.final_checkpoint(config.step_dir(task["step"] - 1))
    return None if path is None else files.hash_of(path)


def of_other_previous(config: ConfigParser) -> str:
    """What is wrong with a step whose previous one was trained anew, and the ways on."""
    before = config["data_loader"]["args"]["task"]["step"] - 1
    return (
        f"it was trained from other weights of step {before} than those that now lie in "
        f"{config.step_dir(before)}; train it anew as well (delete or rename its folder), or put "
        "the old ones back."
    )
