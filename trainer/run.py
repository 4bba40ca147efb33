"""The only wiring: config → task and data → model, teacher → method → optimizer → trainer.

Called by the four entry scripts; training and evaluation are the same path, which evaluation leaves
after the weights are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_method import BaseMethod
from base.base_model import BaseModel
from base.base_trainer import parse_monitor
from base.task import Task
from data_loader.data_loaders import LOADERS, IncrementalDataLoader
from models.model import MODELS, check_arch
from models.weights import load_previous_step, load_strict
from trainer.methods import METHODS
from trainer.optim import OPTIMIZERS, build_optimizer, build_scheduler
from trainer.trainer import Trainer, build_evaluators, describe, task_record
from utils import checkpoint as files
from utils.distributed import SINGLE, Launch, Ranks, launch, plan_launch
from utils.logger import close_logger, log, setup_logger
from utils.lr_scheduler import SCHEDULERS
from utils.metric import EVALUATORS, METRICS
from utils.misc import UserError, choose, listing, seed_from, write_json
from utils.parse_config import ConfigParser


def run(config: ConfigParser) -> None:
    """Check the configuration, then train or evaluate in as many processes as it asks for.

    Raises:
        UserError: whatever is wrong, before anything is allocated or written.
    """
    launch(work, config, check(config))


# ---------------------------------------------------------------------------------------- checks
def check(config: ConfigParser) -> Launch:
    """Resolve the names of the configuration and look for what the run needs.

    Returns:
        Which processes are to be started.

    Raises:
        UserError: an unknown name, an impossible combination, a missing previous step, or a step
            folder that is already taken.
    """
    config.resolve("arch", MODELS)
    config.resolve("evaluator", EVALUATORS)
    arch = config["arch"]["args"]
    pretrained = arch["backbone_pretrained"] if _starts_from_imagenet(config) else False
    check_arch(arch["backbone"], arch["norm_act"], pretrained)
    choose("method", config["method"], METHODS)
    settings = {name for method in METHODS.values() for name in method.settings}
    if not config.from_weights:
        for name in config["hyperparameter"]:
            choose("a key of hyperparameter", name, sorted(settings))
    for name in config["metrics"]:
        choose("an entry of metrics", name, METRICS)
    if not config["metrics"]:
        raise UserError(f"metrics is empty; name some of {listing(METRICS)}.")
    plan = plan_launch(config)
    data = build_data(config, SINGLE)
    _check_writable(config.step_dir())
    if not config.test:
        _check_training(config, plan, data.task)
    elif config.resume is None and not _finished(config.step_dir()):
        raise UserError(
            f"--test: {config.step_dir()} holds no finished run; name the weights with -r."
        )
    return plan


def _check_training(config: ConfigParser, plan: Launch, task: Task) -> None:
    """What only training needs; weights of another version may be evaluated without it."""
    config.resolve("optimizer", OPTIMIZERS)
    config.resolve("lr_scheduler", SCHEDULERS)
    trainer, sgd = config["trainer"], config["optimizer"]["args"]
    if sgd["nesterov"] and not sgd["momentum"]:
        raise UserError("optimizer.args.nesterov needs a momentum above 0; give one, or set false.")
    if trainer["early_stop"] > 0 and trainer["monitor"] == "off":
        raise UserError("trainer.early_stop needs trainer.monitor, which is off; name a metric.")
    synchronised = plan.world > 1 and plan.devices[0].type == "cuda"
    lone = config["data_loader"]["args"]["train"]["batch_size"] == 1 and not synchronised
    if lone and not config["arch"]["args"]["freeze_all_bn"]:
        raise UserError(
            "data_loader.args.train.batch_size (--batch_size) is 1, but BatchNorm cannot learn "
            "from one image, which leaves the pooled branch of the ASPP one value per channel; use "
            "at least 2, or --freeze_bn."
        )
    _, validation = build_evaluators(config, task)
    parse_monitor(trainer["monitor"], [f"val_{name}" for name in validation.names()])
    size = config["data_loader"]["args"]["memory"]["mem_size"]
    if size > 0:
        raise UserError(
            f"data_loader.args.memory.mem_size (--mem_size) is {size}, but training with memory "
            "replay is not available yet; set it to 0."
        )
    _check_previous(config)
    _check_free(config)


def _starts_from_imagenet(config: ConfigParser) -> bool:
    first = config["data_loader"]["args"]["task"]["step"] == 0
    return first and config.mode == "train" and not config.test and config.resume is None


def _check_writable(folder: Path) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:  # such as a name that is too long
        raise UserError(f"trainer.save_dir (--save_dir) cannot be used: {error}.") from None
    if not writable:
        raise UserError(
            f"trainer.save_dir (--save_dir): {folder} is no folder that this user can write to; "
            "choose another."
        )


def _check_previous(config: ConfigParser) -> None:
    step = config["data_loader"]["args"]["task"]["step"]
    if step > 0 and files.final_checkpoint(config.step_dir(step - 1)) is None:
        raise UserError(
            f"step {step} continues from step {step - 1}, but {config.step_dir(step - 1)} holds no "
            "checkpoint-epoch*.pth; train that step first, with the same --name, --task_name, "
            "--task_setting and --save_dir."
        )


def _finished(folder: Path) -> bool:
    """Whether a step folder holds the weights of a finished run."""
    final = files.final_checkpoint(folder)
    return final is not None and files.load(final).get("finished", True)


def _check_free(config: ConfigParser) -> None:
    folder, resume = config.step_dir(), config.resume
    last = folder / files.LAST
    if not last.is_file() and files.final_checkpoint(folder) is None:
        return
    if resume is None or resume.resolve().parent != folder.resolve():
        raise UserError(
            f"{folder} already holds a run; continue it with -r {last}, evaluate it with --test if "
            "it is finished, choose another --name or --save_dir, or delete the folder."
        )
    if last.is_file() and resume.name != files.LAST:
        raise UserError(
            f"-r {resume} is not where the run in {folder} stands; continue it with -r {last}, or "
            "branch off from the older file with another --name."
        )


# ------------------------------------------------------------------------------------------ parts
def build_data(config: ConfigParser, ranks: Ranks) -> IncrementalDataLoader:
    """Task, data sets and loaders of the step."""
    return config.build("data_loader", LOADERS, seed=config["seed"], ranks=ranks)


def build_model(config: ConfigParser, head_sizes: list[int], **changes: Any) -> BaseModel:
    """A model of `arch`, on the CPU.

    Args:
        config: the configuration.
        head_sizes: outputs per head.
        changes: keyword arguments that replace those of `arch.args`.
    """
    return config.resolve("arch", MODELS)(head_sizes, **{**config["arch"]["args"], **changes})


def build_student(config: ConfigParser, method: BaseMethod, ranks: Ranks = SINGLE) -> BaseModel:
    """The model of this step with its starting weights: ImageNet's, or the previous step's."""
    task = method.task
    changes: dict[str, Any] = {"dropout": task.step == 0}
    if not _starts_from_imagenet(config):
        changes["backbone_pretrained"] = False
    with ranks.main_first():  # one process downloads, the others read its file
        return build_model(config, method.head_sizes(), **changes)


def load_previous(config: ConfigParser, method: BaseMethod, student: BaseModel) -> BaseModel | None:
    """Give the student the previous step's weights; return them as the frozen teacher.

    Raises:
        UserError: the previous step is missing, unfinished, of another schedule, or does not fit.
    """
    task = method.task
    path = files.final_checkpoint(config.step_dir(task.step - 1))
    if path is None:
        _check_previous(config)
    source, previous = f"step {task.step - 1}'s checkpoint {path}", files.load(path)
    if not previous.get("finished", True):
        raise UserError(
            f"{source} is not of a finished run; finish that step with "
            f"-r {path.with_name(files.LAST)}."
        )
    mine = task_record(task)
    known = previous.get("task", mine)
    if known["steps"][: task.step] != mine["steps"][: task.step]:
        raise UserError(
            f"{source} is of {describe(known)}, which learnt other classes before step "
            f"{task.step}: {known['steps'][: task.step]} instead of {mine['steps'][: task.step]}."
        )
    head_sizes = method.head_sizes()
    load_previous_step(student, previous["state_dict"], len(head_sizes) - 1, source)
    if not method.needs_teacher:
        return None
    teacher = build_model(config, head_sizes[:-1], backbone_pretrained=False)
    load_strict(teacher, previous["state_dict"], source)
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------- work
def work(config: ConfigParser, ranks: Ranks) -> None:
    """One process of a run."""
    # Only a finished run's own test is the step's result, by which scripts know that it is done.
    chosen = config.test and config.resume is not None
    log_dir = config.log_dir() / ("eval" if chosen else "")
    setup_logger(log_dir / "info.log", config["trainer"]["verbosity"], ranks.is_main)
    try:
        for note in config.notes:
            log.info("%s", note)
        if config.test:
            weights = config.resume or files.final_checkpoint(config.step_dir())
            evaluate(config, ranks, weights, log_dir / "metrics.json")
        else:
            train(config, ranks, log_dir / "metrics.json")
    finally:
        close_logger()


def train(config: ConfigParser, ranks: Ranks, metrics: Path) -> None:
    """Train a step, test it and write `metrics`, a `metrics.json`."""
    data = build_data(config, ranks)
    task = data.task
    method = METHODS[config["method"]](task, config["hyperparameter"])
    _introduce(config, ranks, method)
    # Whatever is wrong with a list or an image set is told now, not after the last epoch.
    iterations = len(data.train_loader)
    _ = data.val_set, data.test_set

    torch.manual_seed(seed_from(config["seed"], task.step, "weights"))
    torch.backends.cudnn.benchmark = True
    student = build_student(config, method, ranks)
    teacher = load_previous(config, method, student) if task.step > 0 else None
    method.prepare(student)
    if ranks.world > 1 and ranks.device.type == "cuda" and not student.frozen_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student.to(ranks.device)
    if teacher is not None:
        teacher.to(ranks.device)
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, config["trainer"]["epochs"] * iterations)
    torch.manual_seed(seed_from(config["seed"], task.step, "dropout", ranks.rank))
    trainer = Trainer(
        config,
        ranks,
        data=data,
        method=method,
        student=student,
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
    )
    if config.resume is not None:
        trainer.resume(config.resume)
    if ranks.is_main:
        write_json(config.step_dir() / "config.json", config.as_dict())
    try:
        trainer.train()
        weights = config.step_dir() / files.epoch_file(trainer.epoch)
        trainer.test(metrics, str(weights), trainer.epoch)
    finally:
        trainer.close()


def evaluate(config: ConfigParser, ranks: Ranks, weights: Path, metrics: Path) -> None:
    """Test a weight file and write `metrics`: the path of training, left after the load."""
    data = build_data(config, ranks)
    method = METHODS[config["method"]](data.task, config["hyperparameter"])
    _introduce(config, ranks, method)
    checkpoint = files.load(weights)
    student = build_student(config, method, ranks)
    load_strict(student, checkpoint["state_dict"], f"weight file {weights}")
    student.to(ranks.device)
    trainer = Trainer(config, ranks, data=data, method=method, student=student)
    trainer.test(metrics, str(weights), int(checkpoint.get("epoch", 0)))


def _introduce(config: ConfigParser, ranks: Ranks, method: BaseMethod) -> None:
    task = method.task
    log.info(
        "%s %s %s, step %d of 0..%d, method %s: %d old and %d new classes (%s)",
        *(task.dataset, task.setting, task.name, task.step, len(task.steps) - 1),
        *(config["method"], len(task.old), len(task.new)),
        listing((task.class_names[label] for label in task.new), most=20),
    )
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    log.info("%d process(es) on %s", ranks.world, device)
    if config.test:
        return
    log.info("global batch: %d", ranks.world * config["data_loader"]["args"]["train"]["batch_size"])
    frozen = config["arch"]["args"]["freeze_all_bn"]
    if task.step == 0 and frozen:
        log.warning("step 0 with frozen BatchNorm: the ASPP keeps its initial statistics for ever")
    if task.step > 0 and not frozen:
        log.warning(
            "step %d trains BatchNorm on new images only; the published runs pass --freeze_bn",
            task.step,
        )
    unused = [name for name in config["hyperparameter"] if name not in method.settings]
    if unused:
        log.info("hyperparameters that %s does not use: %s", config["method"], listing(unused))
