"""What is checked before anything is allocated or written: names, combinations, weights, room."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.base_method import BaseMethod
from base.base_model import BaseModel, HeadPlan
from base.base_trainer import parse_monitor
from base.task import Task
from data_loader import DATA_SETS
from data_loader.data_loaders import IncrementalDataLoader
from models.backbone import BACKBONES
from models.model import MODELS, check_arch
from models.weights import check_fit, check_previous_step
from trainer.base_step import check_base
from trainer.build import (
    build_data,
    build_method,
    build_model,
    describe,
    read_previous,
    starts_from_imagenet,
)
from trainer.evaluation import build_evaluators
from trainer.memory import read_previous as read_previous_memory
from trainer.methods import METHODS
from trainer.optim import AVERAGES, check_optimizer
from trainer.optional import try_optional
from utils import checkpoint as files
from utils.distributed import Launch, Ranks
from utils.errors import UserError, choose, did_you_mean, listing, shortened
from utils.lr_scheduler import SCHEDULERS
from utils.machine import memory_limit
from utils.metric import EVALUATORS, METRICS
from utils.parse_config import ConfigParser

PIXEL = 13  # bytes of a crop's pixel: three colours in float32, a label


def check_names(config: ConfigParser) -> None:
    """Resolve the names of the configuration.

    Raises:
        UserError: an unknown name, an impossible combination, or a switch for which something is
            missing.
    """
    config.resolve("arch", MODELS)
    config.resolve("evaluator", EVALUATORS)
    arch = config["arch"]["args"]
    pretrained = arch["backbone_pretrained"] if starts_from_imagenet(config) else False
    check_arch(arch["backbone"], arch["output_stride"], arch["norm_act"], pretrained)
    args = config["data_loader"]
    known = (*DATA_SETS[args["type"]].tables, args["args"]["task"]["name"])
    for file, name in config.tasks:
        choose(f"{file}: a name in the block tasks", name, known)
    for name in config["metrics"]:
        choose("an entry of metrics", name, METRICS)
    if not config["metrics"]:
        raise UserError(f"metrics is empty; name some of {listing(METRICS)}.")
    try_optional(config)


def check(config: ConfigParser, plan: Launch) -> Path | None:
    """Look for what one step needs.

    Args:
        config: with its names resolved and the method's settings complete.
        plan: which processes will run it.

    Returns:
        The weights to test; None: the step is to be trained.

    Raises:
        UserError: an impossible combination, weights that are missing or do not fit, a step folder
            that is already taken, too little room on the disk.
    """
    data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
    for folder in (config.step_dir(), config.log_dir()):
        _check_writable(folder)
    _check_batches(config)
    if not config.test:
        check_training(config, data)
        if config.base is not None:
            check_base(config, config.base, data)
        _check_start(config, data.task)
        if not config.auto:
            _check_free(config)
        return None
    weights = config.resume or files.final_checkpoint(config.step_dir())
    # Released weights do not say whether their run is finished, and it is.
    if weights is None or not (config.resume or files.load(weights).get("finished", True)):
        raise UserError(
            f"--test: {config.step_dir()} holds no finished run; name the weights with -r."
        )
    method = build_method(config, data.task)
    checkpoint = files.load(weights)
    check_order(data.task, weights, checkpoint)
    check_family(method, weights, checkpoint)
    state = checkpoint["state_dict"]
    check_fit(_skeleton(config, method.heads()), state, f"weight file {weights}")
    return weights


def _check_batches(config: ConfigParser) -> None:
    """Whether this machine could hold the pixels of a batch, if nothing else.

    Raises:
        UserError: it could not; Linux promises what it does not have, and kills who takes it.
    """
    limit = memory_limit()
    for kind in ("train", "val", "test"):
        where = f"data_loader.args.{kind}"
        block = config["data_loader"]["args"][kind]
        side, batch = block["args"]["transform_args"]["crop_size"], block["batch_size"]
        needed = PIXEL * batch * side**2
        if block["args"]["transform"] and limit is not None and needed > limit:
            raise UserError(
                f"a batch of {batch} crops of {side}×{side} pixels has {needed / 2**30:,.1f} GiB, "
                f"but this machine gives {limit / 2**30:,.1f}; lower {where}.batch_size or "
                f"{where}.args.transform_args.crop_size."
            )


def check_order(task: Task, weights: Path, checkpoint: dict[str, Any]) -> None:
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
            f"weight file {weights} is of {describe(known)} and has learnt the label ids "
            f"{shortened(str(learnt), 800)}, but --task_name {task.name} --task_step "
            f"{task.schedule_step} stands for {list(task.seen)}."
        )


def check_family(method: BaseMethod, weights: Path, checkpoint: dict[str, Any]) -> None:
    """Whether the method reads the channels of weights as the one did that trained them.

    Raises:
        UserError: it does not.
    """
    family = checkpoint.get("family", method.family)  # released weights do not say
    if family != method.family:
        raise UserError(
            f"weight file {weights} was trained by '{checkpoint.get('method')}' of the family "
            f"'{family}', but the config's method is of '{method.family}': it would read other "
            "answers from the same channels; put the config.json of their run beside them."
        )


def with_settings(config: ConfigParser) -> ConfigParser:
    """The configuration with every setting of the method; what nobody chose has its default.

    Raises:
        UserError: an unknown method, or a setting that it does not have or that is out of range.
    """
    name = choose("method", config["method"], METHODS)
    kind, given = METHODS[name].Settings, dict(config["hyperparameter"])
    for setting in given.keys() - kind.rules().keys():
        if f"hyperparameter.{setting}" in config.beside:
            del given[setting]
            continue
        others = [other for other in METHODS if setting in METHODS[other].Settings.rules()]
        whose = f", but of {listing(others)}" if others else did_you_mean(setting, kind.rules())
        raise UserError(
            f"hyperparameter.{setting} is no setting of '{name}'{whose}; valid: "
            f"{listing(kind.rules()) or 'none'}."
        )
    settings = asdict(kind.read(given))
    return config.with_values({"hyperparameter": settings})


def check_training(config: ConfigParser, data: IncrementalDataLoader) -> None:
    """Settings that only training needs; weights of another version may be evaluated without them.

    Raises:
        UserError: values that are impossible, or that do not go together.
    """
    check_optimizer(config)
    config.resolve("lr_scheduler", SCHEDULERS)
    _check_method(config, data.task)
    if data.saliency is not None:
        data.saliency.check()
    trainer = config["trainer"]
    if trainer["early_stop"] > 0 and trainer["monitor"] == "off":
        raise UserError("trainer.early_stop needs trainer.monitor, which is off; name a metric.")
    if data.norm_batch == 1 and not config["arch"]["args"]["freeze_all_bn"]:
        raise UserError(
            "data_loader.args.train.batch_size (--batch_size) is 1, but BatchNorm cannot learn "
            "from one image, which leaves the pooled branch of the ASPP one value per channel; use "
            "at least 2, or --freeze_bn."
        )
    data.check_mix()
    images = len(data.raw["train"])
    if images < data.global_batch:
        raise UserError(
            f"the data set has {images} training images, fewer than one batch: "
            f"{data.batch_words()}; choose a smaller one."
        )
    _, validation = build_evaluators(config, data.task)
    parse_monitor(trainer["monitor"], [f"val_{name}" for name in validation.names()])


def _check_method(config: ConfigParser, task: Task) -> None:
    """Whether method, memory, saliency maps and backbone go together.

    Raises:
        UserError: one is given that the method does not use, or it needs one that is not there.
    """
    name, args = config["method"], config["data_loader"]["args"]
    method = build_method(config, task)
    if args["memory"]["mem_size"] > 0 and method.replay_confidence is None:
        others = [key for key, kind in METHODS.items() if kind.replay_confidence is not None]
        raise UserError(
            f"method '{name}' has no replay memory; set data_loader.args.memory.mem_size "
            f"(--mem_size) to 0, or choose one of {listing(others)}."
        )
    if args["memory"]["mem_size"] > 0 and task.joint:
        raise UserError(
            "joint training (--joint) has no old classes to replay; set "
            "data_loader.args.memory.mem_size (--mem_size) to 0."
        )
    if args["saliency_dir"] is not None and not method.reads_saliency:
        raise UserError(
            f"method '{name}' with these settings reads no saliency maps; leave "
            "data_loader.args.saliency_dir (--saliency_dir) null."
        )
    if args["saliency_dir"] is None and method.reads_saliency:
        raise UserError(
            f"method '{name}' with these settings reads a saliency map of every training image, "
            "but data_loader.args.saliency_dir is null; name their folder with --saliency_dir, or "
            f"see --method {name} --help for the setting that does without."
        )
    backbone = config["arch"]["args"]["backbone"]
    if "stages" in method.wants and not BACKBONES[backbone].stages:
        others = [key for key, spec in BACKBONES.items() if spec.stages]
        raise UserError(
            f"method '{name}' compares the maps of a backbone's stages, but arch.args.backbone "
            f"'{backbone}' has none; choose one of {listing(others)}."
        )


def _check_start(config: ConfigParser, task: Task) -> None:
    """Whether the weights to start from fit, and the disk has room for those to come."""
    method = build_method(config, task)
    plan = method.heads()
    model = _skeleton(config, plan)
    if task.step > 0:
        previous, source = read_previous(config, method)
        check_previous_step(model, previous["state_dict"], len(plan.sizes) - 1, source)
        method.start(model, previous.get("method_state", {}))
        if task.step > 1 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
            read_previous_memory(config, task)
    if config.resume is not None:
        resumed = files.load(config.resume)
        trained_by = resumed.get("method", config["method"])
        if trained_by != config["method"]:
            raise UserError(
                f"the checkpoint to resume from, {config.resume}, was trained with method "
                f"'{trained_by}', but this run is '{config['method']}'; give --method {trained_by}."
            )
        source = f"the checkpoint to resume from, {config.resume},"
        check_fit(model, resumed["state_dict"], source)
    folder = config.step_dir()
    # The one that is being written, last.pth and previous.pth; kept ones share their room.
    missing = 3 - sum((folder / name).is_file() for name in (files.LAST, files.PREVIOUS))
    check_room(folder, missing * checkpoint_size(config, task), "the checkpoints of this step need")


def checkpoint_size(config: ConfigParser, task: Task) -> int:
    """Bytes of a checkpoint of a step, of what it mostly holds: weights and optimizer."""
    model = _skeleton(config, build_method(config, task).heads())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averages = len(AVERAGES[config["optimizer"]["type"]]) * trainable
    return 4 * (sum(t.numel() for t in model.state_dict().values()) + averages)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Whether the file system of a folder has room for `needed` bytes.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise UserError(
            f"trainer.save_dir (--save_dir): the file system of {folder} has {free >> 20} MiB "
            f"left, but {what} {needed >> 20} MiB; make room or choose another."
        )


def _skeleton(config: ConfigParser, plan: HeadPlan) -> BaseModel:
    """The model without any values: names and shapes only."""
    with torch.device("meta"):
        return build_model(config, plan, backbone_pretrained=False)


def _existing(folder: Path) -> Path:
    """The nearest folder above (or this one) that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _check_writable(folder: Path) -> None:
    try:
        folder = _existing(folder)
        with tempfile.TemporaryFile(dir=folder):  # asks the file system itself; leaves no trace
            pass
    except OSError as error:  # also a name that is too long, or a file in the way
        raise UserError(
            f"trainer.save_dir (--save_dir): nothing can be written to {folder}: "
            f"{error.strerror}; choose another."
        ) from None


def _check_free(config: ConfigParser) -> None:
    folder, resume = config.step_dir(), config.resume
    last = folder / files.LAST
    if not last.is_file() and files.final_checkpoint(folder) is None:
        return
    if resume is None or resume.resolve().parent != folder.resolve():
        raise UserError(
            f"{folder} already holds a run; continue it with -r auto, evaluate it with --test if "
            "it is finished, choose another --name or --save_dir, or delete the folder."
        )
    newest, _, _ = files.newest_good(folder)
    if newest is not None and resume.resolve() != newest.resolve():
        raise UserError(
            f"-r {resume} is not where the run in {folder} stands; continue it with -r auto, or "
            "branch off from the older file with another --name."
        )
