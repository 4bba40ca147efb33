"""What is to be done for each step of a call, decided once, before anything is written.

A step is trained afresh, continued from a checkpoint, taken over from another run, only tested, or
finished. Processes follow the plan that they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from base.base_method import BaseMethod
from base.base_model import BaseModel
from data_loader.data_loaders import IncrementalDataLoader
from models.weights import check_fit, check_previous_step
from trainer.advice import around_finished
from trainer.build import (
    build_data,
    build_method,
    find_previous,
    load_student,
    previous_source,
    skeleton,
)
from trainer.checks import check_batches, check_names, check_training, with_settings
from trainer.folders import check_room, check_unoccupied, check_writable, checkpoint_size
from trainer.provenance import EPOCHS, LENGTHENED, differ, differences, record
from trainer.replay import read_previous as read_previous_memory
from trainer.results import METRICS, tested_weights
from trainer.shared_step import check_shared, find_shared
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.checkpoint_form import TRAINING_STATE
from utils.errors import UserError
from utils.kept import read_removed
from utils.parse_config import ConfigParser
from utils.processes.launch import Launch, plan_launch
from utils.ranks import Ranks


@dataclass(frozen=True)
class StepPlan:
    """What is to be done for a step.

    Attributes:
        action: "train" afresh; "continue" from `checkpoint`; "adopt" the step 0 of another run,
            whose `checkpoint` it is; "test" the weights of `checkpoint`; "nothing" is left.
        config: of the step.
        checkpoint: as above; None to train afresh.
        previous: checkpoint of the step before, from which training starts; None at step 0.
    """

    action: Literal["train", "continue", "adopt", "test", "nothing"]
    config: ConfigParser
    checkpoint: StoredCheckpoint | None = None
    previous: StoredCheckpoint | None = None

    def release(self) -> None:
        """Give back the memory of what has been read."""
        for stored in (self.checkpoint, self.previous):
            if stored is not None:
                stored.release()


class RunPlan(NamedTuple):
    """Which processes run, the first step that is left for them, and those that follow it."""

    launch: Launch
    first: StepPlan
    later: tuple[ConfigParser, ...]


def plan_run(steps: Sequence[ConfigParser]) -> RunPlan | None:
    """What a call is to do, after all that can be wrong with it has been looked at.

    Args:
        steps: of one task, one after the other.

    Returns:
        None when every step is finished.

    Raises:
        UserError: something is wrong.
    """
    steps = tuple(map(with_settings, steps))
    for config in steps:
        check_names(config)
    launch = plan_launch(steps[0])
    for number, config in enumerate(steps):
        plan = plan_step(config, launch)
        if plan.action != "nothing":
            later = steps[number + 1 :]
            _check_later(later, launch)
            return RunPlan(launch, plan, later)
    return None


def plan_step(config: ConfigParser, launch: Launch) -> StepPlan:
    """What is to be done for one step; whatever it needs is there.

    Raises:
        UserError: the step is finished, but with other settings than these; an impossible
            combination; weights that are missing or do not fit; a folder that is already taken;
            too little room.
    """
    config = _with_batch(config, launch)
    data = build_data(config, Ranks(0, launch.world, launch.devices[0]))
    plan = _decide(config, data)
    config = plan.config
    if plan.action == "nothing":
        return plan
    check_writable(config)
    check_batches(config)
    method = build_method(config, data.task)
    if plan.checkpoint is not None and plan.action == "test":
        load_student(config, method, plan.checkpoint, try_only=True)
        return plan
    check_training(config, data, method)
    if plan.checkpoint is not None and plan.action == "adopt":
        check_shared(config, plan.checkpoint, data)
    model = skeleton(config, method.heads())
    previous = _check_weights(plan, method, model)
    # The one that is being written, last.pth and previous.pth; kept ones share their room.
    there = sum((config.step_dir() / name).is_file() for name in (files.LAST, files.PREVIOUS))
    needed = (3 - there) * checkpoint_size(config, model)
    check_room(config.step_dir(), needed, "the checkpoints of this step need")
    if not config.call.auto:
        check_unoccupied(config, plan.checkpoint)
    return StepPlan(plan.action, config, plan.checkpoint, previous)


def _with_batch(config: ConfigParser, launch: Launch) -> ConfigParser:
    """The configuration with the recipe's global batch shared out among the processes."""
    if config.global_batch is None:
        return config
    each = launch.world * config["trainer"]["accumulate"]
    batch = max(1, config.global_batch // each)
    return config.with_values({"data_loader.args.train.batch_size": batch})


# --------------------------------------------------------------------------------- the decision
def _decide(config: ConfigParser, data: IncrementalDataLoader) -> StepPlan:
    """Which of the actions it is, and from which checkpoint."""
    if config.call.test:
        given = config.call.resume
        return StepPlan("test", config, StoredCheckpoint(given) if given else _finished(config))
    if config.call.auto:
        return _go_on(config, data)
    if config.call.base is not None:
        return StepPlan("adopt", config, find_shared(config, data.task))
    if config.call.resume is not None:
        return StepPlan("continue", config, StoredCheckpoint(config.call.resume))
    return StepPlan("train", config)


def _finished(config: ConfigParser, known: StoredCheckpoint | None = None) -> StoredCheckpoint:
    """The kept checkpoint of the step, which is to be finished; `known` has been read."""
    path = files.final_checkpoint(config.step_dir())
    if path is not None:
        weights = StoredCheckpoint(path) if known is None else known.at(path)
        if weights.finished:
            return weights
    folder = config.step_dir()
    if read_removed(folder):
        raise UserError(
            f"--test: the weights of the finished step in {folder} were removed (trainer.keep was "
            f"last); its result is in {config.log_dir() / METRICS}."
        )
    raise UserError(f"--test: {folder} holds no finished run; name the weights with -r.")


def _go_on(config: ConfigParser, data: IncrementalDataLoader) -> StepPlan:
    """What `-r auto` means for a step: whatever is left of it."""
    folder = config.step_dir()
    stored, skipped = files.newest_good(folder)
    if stored is None and (removed := read_removed(folder)):
        return _without_weights(config, data, removed)
    if stored is None:
        config = config.noted(*skipped, "-r auto: no checkpoint yet, a fresh start")
        if config.call.base is not None:
            return StepPlan("adopt", config, find_shared(config, data.task))
        return StepPlan("train", config)
    if not stored.finished:
        config = config.noted(*skipped, f"-r auto: {stored.path}")
        return StepPlan("continue", config, stored)
    _check_finished(config, data, stored.content)
    metrics = config.log_dir() / METRICS
    why = "the step is trained, its test is left"
    path = files.final_checkpoint(folder) or stored.path
    if metrics.is_file():
        if tested_weights(metrics) == files.hash_of(path):
            return _nothing(config)
        why += f": {metrics} does not name the weights {path}"
    config = config.noted(*skipped, f"-r auto: {why}")
    return StepPlan("test", config, _finished(config, stored))


def _nothing(config: ConfigParser) -> StepPlan:
    print(f"{config.step_dir()} is finished, see {config.log_dir() / METRICS}: nothing to do")
    return StepPlan("nothing", config)


def _without_weights(
    config: ConfigParser, data: IncrementalDataLoader, removed: Mapping[str, Any]
) -> StepPlan:
    """What is left of a finished step whose weights were removed: nothing."""
    _check_finished(config, data, removed)
    metrics = config.log_dir() / METRICS
    if tested_weights(metrics) == removed["weights"]:
        return _nothing(config)
    raise UserError(
        f"the weights of the finished step in {config.step_dir()} were removed (trainer.keep was "
        f"last), and {metrics} does not tell their result; delete the folder to train it anew."
    )


def _check_finished(
    config: ConfigParser, data: IncrementalDataLoader, stored: Mapping[str, Any]
) -> None:
    """Whether a finished step is the one that this call would train; arguments as below.

    Raises:
        UserError: it is of another run, or was trained from other weights than there are now.
    """
    _check_same_run(config, data, stored)
    if differ(previous_weights(config), stored.get("previous")):
        raise UserError(
            f"{config.step_dir()} holds a finished step, but {previous_trained_anew(config)}"
        )


def _check_same_run(
    config: ConfigParser, data: IncrementalDataLoader, stored: Mapping[str, Any]
) -> None:
    """Whether the step that a checkpoint is of is the one that a configuration asks for.

    Args:
        stored: what the checkpoint holds, or what is known of a removed one.

    Raises:
        UserError: it is another one.
    """
    finished, folder = stored.get("finished", True), config.step_dir()
    if "record" not in stored:
        return
    here, there = record(config, data, None), stored["record"]
    state = "a finished step" if finished else "an unfinished step"
    differs = differences(here, there, ignore=(EPOCHS, LENGTHENED))
    epochs = here["settings"][EPOCHS]
    trained = there["settings"].get(EPOCHS, epochs)
    if not differs and epochs == trained:
        return
    around = around_finished(config, data.task) if finished else ""
    if differs:
        raise UserError(
            f"{folder} holds {state} of another run: {'; '.join(differs)}; give the same, or "
            f"another --name for a new run{around}."
        )
    ways = f"give --epochs {trained}, or train {epochs} epochs anew under another --name{around}"
    if epochs > trained and finished and stored.keys() >= TRAINING_STATE:
        ways += (
            f"; -r {folder / files.LAST} --epochs {epochs} lengthens the step, with a learning "
            "rate that rises again where the epochs of before had brought it down"
        )
    raise UserError(
        f"{folder} holds {state} of {trained} epochs, but trainer.epochs (--epochs) is {epochs}; "
        f"{ways}."
    )


def previous_weights(config: ConfigParser) -> str | None:
    """Hash of the weights that this step starts from; None at step 0 or where none are known."""
    task = config["data_loader"]["args"]["task"]
    if task["step"] == 0 or task["joint"]:
        return None
    folder = config.step_dir(task["step"] - 1)
    path = files.final_checkpoint(folder)
    if path is not None:
        return files.hash_of(path)
    removed = read_removed(folder)
    return removed["weights"] if removed else None


def previous_trained_anew(config: ConfigParser) -> str:
    """What is wrong with a step whose previous one was trained anew, and the ways on."""
    before = config["data_loader"]["args"]["task"]["step"] - 1
    return (
        f"it was trained from other weights of step {before} than those that now lie in "
        f"{config.step_dir(before)}; train it anew as well (delete or rename its folder), or put "
        "the old ones back."
    )


# ------------------------------------------------------------------- what the decision depends on
def _check_weights(plan: StepPlan, method: BaseMethod, model: BaseModel) -> StoredCheckpoint | None:
    """Whether the weights fit from which a step starts or goes on; gives the previous step's.

    Args:
        model: the step's, without values.

    Raises:
        UserError: they do not, or are of another method or step.
    """
    config, task, previous = plan.config, method.task, None
    if task.step > 0:
        previous = find_previous(config, method)
        source = previous_source(task, previous.path)
        new_head = len(method.heads().sizes) - 1
        check_previous_step(model, previous.content["state_dict"], new_head, source)
        method.start(model, previous.content.get("method_state", {}))
        if task.step > 1 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
            read_previous_memory(config, task)
    if plan.checkpoint is not None and plan.action == "continue":
        resumed, path = plan.checkpoint.content, plan.checkpoint.path
        trained_by = resumed.get("method", config["method"])
        if trained_by != config["method"]:
            raise UserError(
                f"the checkpoint to resume from, {path}, was trained with method '{trained_by}', "
                f"but this run is '{config['method']}'; give --method {trained_by}."
            )
        check_fit(model, resumed["state_dict"], f"the checkpoint to resume from, {path},")
    return previous


def _check_later(steps: Sequence[ConfigParser], launch: Launch) -> None:
    """Look at the steps that follow the first of a launch, as far as can be said before it is done.

    Raises:
        UserError: what is wrong with a step: settings, images, a run of other settings in its
            folder, too little room for the checkpoints of all.
    """
    room = 0
    for config in (config for config in steps if not config.call.test):
        config = _with_batch(config, launch)
        data = build_data(config, Ranks(0, launch.world, launch.devices[0]))
        method = build_method(config, data.task)
        check_training(config, data, method)
        _check_images(config, data, launch)
        stored, _ = files.newest_good(config.step_dir())
        known = stored.content if stored else read_removed(config.step_dir())
        if known is None:
            room += checkpoint_size(config, skeleton(config, method.heads()), finished=True)
        else:
            _check_same_run(config, data, known)
    if room:
        check_room(steps[-1].step_dir(), room, "the checkpoints of the later steps need")


def _check_images(config: ConfigParser, data: IncrementalDataLoader, launch: Launch) -> None:
    """Whether a later step has the images for a batch.

    Raises:
        UserError: it has not.
    """
    alone = build_data(config, Ranks(0, 1, launch.devices[0]))  # the others are not there yet
    alone.setup("train", "val", "test")
    memory, images = data.memory_policy, len(alone.train_set)
    replayed = memory["mem_size"] if memory["mix"] == "concat" else 0
    if images + replayed < data.global_batch:
        raise UserError(
            f"the training set of step {data.task.step} has {images} images, fewer than one "
            f"batch: {data.batch_text()}; choose a smaller one."
        )
