"""How the parts of a run are built: task, data, method, networks with their weights, switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.base_method import BaseMethod
from base.base_model import BaseModel, HeadPlan
from base.task import Task, make_task
from data_loader import DATA_SETS
from data_loader.data_loaders import IncrementalDataLoader, loaders
from models.folding import fold_for_inference, fold_for_training
from models.model import MODELS
from models.weights import check_fit, load_previous_step, load_strict
from trainer.advice import base_of_family
from trainer.methods import METHODS
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.errors import UserError, choose, shortened
from utils.kept import read_removed
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE, Ranks


def build_data(config: ConfigParser, ranks: Ranks) -> IncrementalDataLoader:
    """Task, data sets and loaders of the step."""
    return config.build(
        "data_loader",
        loaders(),
        cache_dir=config.cache_dir,
        accumulate=config["trainer"]["accumulate"],
        seed=config["seed"],
        ranks=ranks,
    )


def build_task(config: ConfigParser) -> Task:
    """The task alone, where no data set is needed, nor its root."""
    data_set = DATA_SETS[choose("data_loader.type", config["data_loader"]["type"], DATA_SETS)]
    args = config["data_loader"]["args"]
    own, task = args["class_names"], args["task"]
    return make_task(
        data_set.name,
        data_set.tables,
        own or data_set.known_names(args["data_dir"]),
        own_classes=own is not None,
        background=data_set.background,
        **{key: task[key] for key in ("name", "setting", "step", "steps", "joint")},
    )


def build_model(config: ConfigParser, plan: HeadPlan, **changes: Any) -> BaseModel:
    """A model of `arch`, on the CPU; `changes` replace keyword arguments of `arch.args`."""
    return config.resolve("arch", MODELS)(plan, **{**config["arch"]["args"], **changes})


def build_student(
    config: ConfigParser, method: BaseMethod, ranks: Ranks = SINGLE, *, from_imagenet: bool = False
) -> BaseModel:
    """The model of this step, its backbone with the weights of ImageNet that the config names."""
    changes = {} if from_imagenet else {"backbone_pretrained": False}
    with ranks.main_first():  # one process downloads, the others read its file
        return build_model(config, method.heads(), dropout=method.dropout, **changes)


def skeleton(config: ConfigParser, heads: HeadPlan) -> BaseModel:
    """The model without any values: names and shapes only."""
    with torch.device("meta"):
        return build_model(config, heads, backbone_pretrained=False)


def load_student(
    config: ConfigParser, method: BaseMethod, weights: StoredCheckpoint, *, try_only: bool = False
) -> BaseModel:
    """The model of this step with the weights of a file, all of them and no others.

    Args:
        config, method: of the step.
        weights: of this step, or released ones.
        try_only: only see whether they fit, and give a model without values.

    Raises:
        UserError: the weights are of other classes or of another family, or do not fit.
    """
    checkpoint, source = weights.content, f"weight file {weights.path}"
    check_order(method.task, source, checkpoint)
    check_family(method, source, checkpoint)
    if try_only:
        student = skeleton(config, method.heads())
        check_fit(student, checkpoint["state_dict"], source)
    else:
        student = build_student(config, method)
        load_strict(student, checkpoint["state_dict"], source)
    return student


def check_order(task: Task, source: str, checkpoint: Mapping[str, Any]) -> None:
    """Whether the channels of weights are the classes of the task, whatever its steps are.

    Raises:
        UserError: they are others.
    """
    if "task" not in checkpoint:
        return  # released weights
    known = checkpoint["task"]
    learnt = [label for ids in known["steps"][: known["step"] + 1] for label in ids]
    if learnt != list(task.seen):
        raise UserError(
            f"{source} is of {describe(known)} and has learnt the label ids "
            f"{shortened(str(learnt), 800)}, but --task_name {task.name} --task_step "
            f"{task.schedule_step} stands for {list(task.seen)}."
        )


def check_family(method: BaseMethod, source: str, checkpoint: Mapping[str, Any]) -> None:
    """Whether the method reads the channels of weights as the one did that trained them.

    Raises:
        UserError: it does not.
    """
    family = checkpoint.get("family", method.family)  # released weights do not say
    if family != method.family:
        raise UserError(
            f"{source} was trained by '{checkpoint.get('method')}' of the family '{family}', but "
            f"the config's method is of '{method.family}': it would read other answers from the "
            "same channels; put the config.json of their run beside them."
        )


def build_method(config: ConfigParser, task: Task) -> BaseMethod:
    """The method of the step, with its settings."""
    return METHODS[config["method"]](task, config["hyperparameter"])


def find_previous(config: ConfigParser, method: BaseMethod) -> StoredCheckpoint:
    """The previous step's checkpoint.

    Raises:
        UserError: the previous step is missing, damaged, unfinished, of another schedule, or of
            another family of methods.
    """
    task = method.task
    folder = config.step_dir(task.step - 1)
    path = files.final_checkpoint(folder)
    if path is None and read_removed(folder):
        raise UserError(
            f"step {task.step} continues from step {task.step - 1}, but the weights of that were "
            f"removed from {folder} (trainer.keep was last); delete the folders of the steps after "
            "0, and train them anew, with --set trainer.keep=weights to keep all of them."
        )
    if path is None:
        raise UserError(
            f"step {task.step} continues from step {task.step - 1}, but {folder} holds no "
            "checkpoint-epoch*.pth; train that step first, with the same --name, --task_name, "
            "--task_setting and --save_dir."
        )
    previous, source = StoredCheckpoint(path), previous_source(task, path)
    if not previous.finished:
        raise UserError(
            f"{source} is not of a finished run; finish that step with --task_step "
            f"{task.step - 1} -r auto."
        )
    own = task_record(task)
    known = previous.content.get("task", own)
    if known["steps"][: task.step] != own["steps"][: task.step]:
        raise UserError(
            f"{source} is of {describe(known)}, which learnt other classes before step "
            f"{task.step}: {shortened(str(known['steps'][: task.step]), 800)} instead of "
            f"{own['steps'][: task.step]}."
        )
    family = previous.content.get("family", "auxiliary")  # released files are DKD's
    if family != method.family:
        raise UserError(
            f"{source} was trained by '{previous.content.get('method', 'dkd')}': "
            f"{base_of_family(family, config['method'])}."
        )
    return previous


def previous_source(task: Task, path: Path) -> str:
    """What the previous step's checkpoint is, for messages."""
    return f"step {task.step - 1}'s checkpoint {path}"


@dataclass(frozen=True)
class Previous:
    """What a step starts from; of step 0 nothing.

    Attributes:
        state: the previous step's weights by name, as they were loaded, on the CPU.
        sha256: their hash.
        teacher: the frozen model with these weights, if the method needs one.
        method_state: the method's, after that step.
        data: what that step's data set held (`IncrementalDataLoader.contents`), where it is known.
    """

    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sha256: str | None = None
    teacher: BaseModel | None = None
    method_state: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, torch.Tensor] = field(default_factory=dict)


def load_previous(
    config: ConfigParser, method: BaseMethod, student: BaseModel, stored: StoredCheckpoint
) -> Previous:
    """Give the student the previous step's weights.

    Raises:
        UserError: they do not fit.
    """
    checkpoint, source = stored.content, previous_source(method.task, stored.path)
    state, plan = checkpoint["state_dict"], method.heads()
    load_previous_step(student, state, len(plan.sizes) - 1, source)
    teacher = None
    if method.needs_teacher:
        teacher = build_model(config, plan.previous(), backbone_pretrained=False)
        load_strict(teacher, state, source)
        teacher.requires_grad_(False).eval()
    return Previous(
        {name.removeprefix("module."): tensor for name, tensor in state.items()},
        files.weights_hash(state),
        teacher,
        checkpoint.get("method_state", {}),
        checkpoint.get("data", {}),
    )


def apply_fast(
    config: ConfigParser, student: BaseModel, teacher: BaseModel | None = None, *, trains: bool
) -> None:
    """Apply the switches of the block `fast`, in place, to models with their weights on the device.

    Where the student `trains`, it keeps its parameters.
    """
    fast = config["fast"]
    if fast["fold_bn"]:
        if student.frozen_bn:
            (fold_for_training if trains else fold_for_inference)(student)
        if teacher is not None:
            fold_for_inference(teacher)
    for model in (student, teacher):
        if model is not None and fast["channels_last"]:
            model.channels_last()
        if model is not None and fast["compile"]:
            model.compile()


def task_record(task: Task) -> dict[str, Any]:
    """What a checkpoint remembers of its task."""
    return {
        "dataset": task.dataset,
        "name": task.name,
        "setting": task.setting,
        "step": task.step,
        "steps": [list(ids) for ids in task.steps],
    }


def describe(record: Mapping[str, Any]) -> str:
    """A task record as text."""
    names = (str(record[key]) for key in ("dataset", "setting", "name"))
    return f"step {record['step']} of {' '.join(map(shortened, names))}"
