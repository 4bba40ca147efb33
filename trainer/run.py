"""The only wiring: config → task and data → model, teacher → method → optimizer → trainer.

Called by the four entry scripts; training and evaluation are the same path, which evaluation leaves
after the weights are loaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_method import BaseMethod
from base.base_model import BaseModel, HeadPlan
from base.base_trainer import parse_monitor
from base.task import Task
from data_loader.data_loaders import LOADERS, IncrementalDataLoader
from data_loader.memory import read as read_memory
from models import fused_loss
from models.folding import fold, fuse
from models.model import MODELS, check_arch
from models.weights import check_fit, check_previous_step, load_previous_step, load_strict
from trainer.base_step import adopt, check_base
from trainer.memory import previous_file, replay
from trainer.methods import METHODS
from trainer.optim import AVERAGES, build_optimizer, build_scheduler, check_optimizer
from trainer.record import differences, record
from trainer.trainer import Trainer, build_evaluators, describe, task_record
from utils import checkpoint as files
from utils import interrupt
from utils.distributed import SINGLE, Launch, Ranks, launch, plan_launch
from utils.logger import close_logger, log, setup_logger
from utils.lr_scheduler import SCHEDULERS
from utils.metric import EVALUATORS, METRICS
from utils.misc import UserError, choose, listing, seed_from, sha256, write_json
from utils.parse_config import ConfigParser

METRICS_FILE = "metrics.json"  # of a step's test, by which one knows that the step is done


def run(config: ConfigParser) -> None:
    """Check the configuration, then train or evaluate in as many processes as it asks for.

    Raises:
        UserError: whatever is wrong, before anything is allocated or written.
        Interrupted: a signal stopped the run.
    """
    if config.auto and not config.test:
        config = where_it_stands(config)
    if config is not None:
        launch(work, config, check(config))


def where_it_stands(config: ConfigParser) -> ConfigParser | None:
    """What `-r auto` means for this step: continue, test, start anew, or (None) nothing is left.

    Raises:
        UserError: the step is finished, but with other settings than these.
    """
    path, checkpoint, skipped = files.newest_good(config.step_dir())
    if path is None:
        return config.changed(notes=(*skipped, "-r auto: no checkpoint yet, a fresh start"))
    if not checkpoint.get("finished", True):
        return config.changed(resume=path, notes=(*skipped, f"-r auto: {path}"))
    if "record" in checkpoint:
        plan = plan_launch(config)
        data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
        differs = differences(record(config, data, None), checkpoint["record"])
        if differs:
            raise UserError(
                f"{config.step_dir()} holds a finished step of another run: {'; '.join(differs)}; "
                "give the same, or another --name for a new run."
            )
    metrics = config.log_dir() / METRICS_FILE
    if not metrics.is_file():
        notes = (*skipped, "-r auto: the step is trained, its test is left")
        return config.changed(test=True, notes=notes)
    print(f"{config.step_dir()} is finished, see {metrics}: nothing to do")
    return None


# ---------------------------------------------------------------------------------------- checks
def check(config: ConfigParser) -> Launch:
    """Resolve the names of the configuration and look for what the run needs.

    Returns:
        Which processes are to be started.

    Raises:
        UserError: an unknown name, an impossible combination, weights that are missing or do not
            fit, a step folder that is already taken, too little room on the disk.
    """
    config.resolve("arch", MODELS)
    config.resolve("evaluator", EVALUATORS)
    arch = config["arch"]["args"]
    pretrained = arch["backbone_pretrained"] if _starts_from_imagenet(config) else False
    check_arch(arch["backbone"], arch["output_stride"], arch["norm_act"], pretrained)
    choose("method", config["method"], METHODS)
    settings = {name for method in METHODS.values() for name in method.settings}
    for name in config["hyperparameter"]:
        if f"hyperparameter.{name}" not in config.beside:
            choose("a key of hyperparameter", name, sorted(settings))
    for name in config["metrics"]:
        choose("an entry of metrics", name, METRICS)
    if not config["metrics"]:
        raise UserError(f"metrics is empty; name some of {listing(METRICS)}.")
    compiler = os.environ.get("CXX", "g++"), "clang++"
    if config["fast"]["compile"] and not any(map(shutil.which, compiler)):
        raise UserError(
            f"fast.compile needs a C++ compiler, but there is no {listing(compiler)} here; install "
            "one, or set it to false."
        )
    plan = plan_launch(config)
    data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
    _check_writable(config.step_dir())
    if not config.test:
        _check_training(config, plan, data)
        return plan
    weights = config.resume or files.final_checkpoint(config.step_dir())
    if weights is None or (config.resume is None and not _finished(weights)):
        raise UserError(
            f"--test: {config.step_dir()} holds no finished run; name the weights with -r."
        )
    method = METHODS[config["method"]](data.task, config["hyperparameter"])
    state = files.load(weights)["state_dict"]
    check_fit(_skeleton(config, method.heads()), state, f"weight file {weights}")
    return plan


def _check_training(config: ConfigParser, plan: Launch, data: IncrementalDataLoader) -> None:
    """What only training needs; weights of another version may be evaluated without it."""
    check_optimizer(config)
    config.resolve("lr_scheduler", SCHEDULERS)
    trainer = config["trainer"]
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
    images = len(data.raw["train"])
    if images < data.global_batch:
        raise UserError(
            f"the data set has {images} training images, fewer than one batch: "
            f"{data.batch_words()}; choose a smaller one."
        )
    _, validation = build_evaluators(config, data.task)
    parse_monitor(trainer["monitor"], [f"val_{name}" for name in validation.names()])
    if config.base is not None:
        check_base(config, data)
    _check_start(config, data.task)
    if not config.auto:
        _check_free(config)


def _check_start(config: ConfigParser, task: Task) -> None:
    """Whether the weights to start from fit, and the disk has room for those to come."""
    method = METHODS[config["method"]](task, config["hyperparameter"])
    plan = method.heads()
    model = _skeleton(config, plan)
    if task.step > 0:
        state, source = read_previous(config, task)
        check_previous_step(model, state, len(plan.sizes) - 1, source)
        if task.step > 1 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
            read_memory(previous_file(config))
    if config.resume is not None:
        state = files.load(config.resume)["state_dict"]
        check_fit(model, state, f"the checkpoint to resume from, {config.resume},")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averages = AVERAGES[config["optimizer"]["type"]] * trainable
    size = 4 * (sum(t.numel() for t in model.state_dict().values()) + averages)
    folder = config.step_dir()
    # The one that is being written, last.pth and previous.pth; kept ones share their room.
    missing = 3 - sum((folder / name).is_file() for name in (files.LAST, files.PREVIOUS))
    free = shutil.disk_usage(_existing(folder)).free
    if free < missing * size:
        raise UserError(
            f"trainer.save_dir (--save_dir): the file system of {folder} has {free >> 20} MiB "
            f"left, but the checkpoints of this step need {missing * size >> 20} MiB; make room or "
            "choose another."
        )


def _skeleton(config: ConfigParser, plan: HeadPlan) -> BaseModel:
    """The model without any values: names and shapes only."""
    with torch.device("meta"):
        return build_model(config, plan, backbone_pretrained=False)


def _starts_from_imagenet(config: ConfigParser) -> bool:
    first = config["data_loader"]["args"]["task"]["step"] == 0
    trains = config.mode == "train" and not config.test and config.base is None
    return first and trains and config.resume is None


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


def _finished(weights: Path) -> bool:
    """Whether a kept checkpoint is of a finished run; released ones do not say, and are."""
    return files.load(weights).get("finished", True)


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


# ------------------------------------------------------------------------------------------ parts
def build_data(config: ConfigParser, ranks: Ranks) -> IncrementalDataLoader:
    """Task, data sets and loaders of the step."""
    return config.build(
        "data_loader",
        LOADERS,
        cache_dir=config.cache_dir,
        accumulate=config["trainer"]["accumulate"],
        seed=config["seed"],
        ranks=ranks,
    )


def build_model(config: ConfigParser, plan: HeadPlan, **changes: Any) -> BaseModel:
    """A model of `arch`, on the CPU.

    Args:
        config: the configuration.
        plan: which heads.
        changes: keyword arguments that replace those of `arch.args`.
    """
    return config.resolve("arch", MODELS)(plan, **{**config["arch"]["args"], **changes})


def build_student(config: ConfigParser, method: BaseMethod, ranks: Ranks = SINGLE) -> BaseModel:
    """The model of this step with its starting weights: ImageNet's, or the previous step's."""
    task = method.task
    changes: dict[str, Any] = {"dropout": task.step == 0}
    if not _starts_from_imagenet(config):
        changes["backbone_pretrained"] = False
    with ranks.main_first():  # one process downloads, the others read its file
        return build_model(config, method.heads(), **changes)


def read_previous(config: ConfigParser, task: Task) -> tuple[dict[str, torch.Tensor], str]:
    """The previous step's weights, and what they are in words.

    Raises:
        UserError: the previous step is missing, damaged, unfinished or of another schedule.
    """
    folder = config.step_dir(task.step - 1)
    path = files.final_checkpoint(folder)
    if path is None:
        raise UserError(
            f"step {task.step} continues from step {task.step - 1}, but {folder} holds no "
            "checkpoint-epoch*.pth; train that step first, with the same --name, --task_name, "
            "--task_setting and --save_dir."
        )
    source, previous = f"step {task.step - 1}'s checkpoint {path}", files.load(path)
    if not previous.get("finished", True):
        raise UserError(
            f"{source} is not of a finished run; finish that step with --task_step "
            f"{task.step - 1} -r auto."
        )
    mine = task_record(task)
    known = previous.get("task", mine)
    if known["steps"][: task.step] != mine["steps"][: task.step]:
        raise UserError(
            f"{source} is of {describe(known)}, which learnt other classes before step "
            f"{task.step}: {known['steps'][: task.step]} instead of {mine['steps'][: task.step]}."
        )
    return previous["state_dict"], source


def load_previous(config: ConfigParser, method: BaseMethod, student: BaseModel) -> BaseModel | None:
    """Give the student the previous step's weights; return them as the frozen teacher.

    Raises:
        UserError: as `read_previous`; or the weights do not fit.
    """
    state, source = read_previous(config, method.task)
    plan = method.heads()
    load_previous_step(student, state, len(plan.sizes) - 1, source)
    if not method.needs_teacher:
        return None
    teacher = build_model(config, plan.previous(), backbone_pretrained=False)
    load_strict(teacher, state, source)
    return teacher.requires_grad_(False).eval()


def quicken(
    config: ConfigParser, student: BaseModel, teacher: BaseModel | None = None, *, trains: bool
) -> None:
    """Apply the switches of the block `fast` to the models, in place, and to the losses.

    Args:
        config: the configuration.
        student: with its weights, on the device.
        teacher: likewise.
        trains: whether the student will be trained.
    """
    fast = config["fast"]
    if trains:
        device = next(student.parameters()).device
        fault = fused_loss.fault(device) if fast["fused_loss"] else ""
        fused_loss.switched_on = fast["fused_loss"] and not fault
        if fault:
            log.warning(
                "fast.fused_loss cannot run here (%s): the losses are computed in chunks, which "
                "gives the same numbers",
                fault,
            )
    if fast["fold_bn"]:
        if student.frozen_bn:
            (fold if trains else fuse)(student)
        if teacher is not None:
            fuse(teacher)
    for model in (student, teacher):
        if model is not None and fast["channels_last"]:
            model.channels_last()
        if model is not None and fast["compile"]:
            model.compile()


# ------------------------------------------------------------------------------------------- work
def work(config: ConfigParser, ranks: Ranks) -> None:
    """One process of a run."""
    log_dir = config.log_dir()
    if config.test and config.resume is not None:
        # Only a finished run's own test is the step's result, by which scripts know that it is
        # done. Those of other weights lie apart, by what the files hold, however they are named.
        log_dir = log_dir / "eval" / f"{config.resume.stem}-{sha256(config.resume)[:12]}"
    setup_logger(log_dir / "info.log", config["trainer"]["verbosity"], ranks.is_main)
    metrics = log_dir / METRICS_FILE
    writes = ranks.is_main and not config.test
    try:
        with files.claim(config.step_dir()) if writes else nullcontext():
            for note in config.notes:
                log.info("%s", note)
            if config.base is not None and not config.test:
                adopt(config, ranks, build_data(config, ranks))
                config = config.changed(test=True)
            if config.test:
                weights = config.resume or files.final_checkpoint(config.step_dir())
                evaluate(config, ranks, weights, metrics)
            else:
                train(config, ranks, metrics)
    finally:
        close_logger()


def train(config: ConfigParser, ranks: Ranks, metrics: Path) -> None:
    """Train a step, test it and write `metrics`, a `metrics.json`."""
    data = build_data(config, ranks)
    task = data.task
    method = METHODS[config["method"]](task, config["hyperparameter"])
    _introduce(config, ranks, method, data)
    # Whatever is wrong with a list or an image set is told now, not after the last epoch.
    _ = data.train_set, data.val_set, data.test_set

    torch.manual_seed(seed_from(config["seed"], task.step, "weights"))
    student = build_student(config, method, ranks)
    teacher = load_previous(config, method, student) if task.step > 0 else None
    student.to(ranks.device)
    if task.step > 0 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
        replay(config, ranks, data, student)
    iterations = data.train_loader.batch_sampler.iterations
    log.info("%s", data.leakage())
    method.prepare(student)
    if ranks.world > 1 and ranks.device.type == "cuda" and not student.frozen_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if teacher is not None:
        teacher.to(ranks.device)
    quicken(config, student, teacher, trains=True)
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, config["trainer"]["epochs"] * iterations)
    torch.manual_seed(seed_from(config["seed"], task.step, "dropout", ranks.rank))
    train_hash = ranks.gather(data.train_hash if ranks.is_main else None)[0]
    trainer = Trainer(
        config,
        ranks,
        data=data,
        method=method,
        student=student,
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
        record=record(config, data, train_hash),
    )
    if config.resume is not None:
        trainer.resume(config.resume)
    if ranks.is_main:
        write_json(config.step_dir() / "config.json", config.as_dict())
    try:
        interrupt.defer()  # ranks stop together, after an iteration or a batch
        trainer.train()
        weights = config.step_dir() / files.epoch_file(trainer.epoch)
        trainer.test(metrics, str(weights), trainer.epoch)
    finally:
        trainer.close()


def evaluate(config: ConfigParser, ranks: Ranks, weights: Path, metrics: Path) -> None:
    """Test a weight file and write `metrics`: the path of training, left after the load."""
    data = build_data(config, ranks)
    method = METHODS[config["method"]](data.task, config["hyperparameter"])
    _introduce(config, ranks, method, data)
    checkpoint = files.load(weights)
    student = build_student(config, method, ranks)
    load_strict(student, checkpoint["state_dict"], f"weight file {weights}")
    student.to(ranks.device)
    quicken(config, student, trains=False)
    trainer = Trainer(config, ranks, data=data, method=method, student=student)
    interrupt.defer()
    trainer.test(metrics, str(weights), int(checkpoint.get("epoch", 0)))


def _introduce(
    config: ConfigParser, ranks: Ranks, method: BaseMethod, data: IncrementalDataLoader
) -> None:
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
    _tell_batch(ranks, data, frozen=config["arch"]["args"]["freeze_all_bn"])
    memory = config["data_loader"]["args"]["memory"]
    replays = method.task.step > 0 and memory["mem_size"] > 0
    if replays and memory["labels"] == "stored" and not method.learns_old:
        log.warning(
            "memory.labels is 'stored', but %s reads labels of new classes only: it learns what it "
            "learns with 'current'",
            config["method"],
        )
    if config["trainer"]["monitor"] != "off" and not data.blocks["val"]["cross_val"]:
        log.warning(
            "trainer.monitor chooses on validation images, and those are test images as well: set "
            "data_loader.args.val.cross_val to choose on training images that are held out"
        )
    unused = [name for name in config["hyperparameter"] if name not in method.settings]
    if unused:
        log.info("hyperparameters that %s does not use: %s", config["method"], listing(unused))


def _tell_batch(ranks: Ranks, data: IncrementalDataLoader, *, frozen: bool) -> None:
    """How large the global batch is and what BatchNorm sees of it, with warnings."""
    task, published = data.task, data.published_batch
    log.info("global batch: %d, %s", data.global_batch, data.batch_words())
    if task.published and data.global_batch != published:
        log.warning(
            "the published runs have a global batch of %d images, this one has %d: its figures "
            "will differ; change --batch_size, the processes or --accumulate",
            *(published, data.global_batch),
        )
    if frozen:
        log.info("BatchNorm: frozen, with the statistics of the weights it starts from")
        if task.step == 0:
            log.warning(
                "step 0 with frozen BatchNorm: the ASPP keeps its initial statistics for ever"
            )
        return
    synchronised = ranks.world > 1 and ranks.device.type == "cuda"
    seen = data.norm_batch
    scope = "synchronised over the GPUs" if synchronised else "of each process and batch alone"
    log.info("BatchNorm: statistics over %d images, %s", seen, scope)
    if task.step > 0:
        log.warning(
            "step %d trains BatchNorm on new images only; the published runs pass --freeze_bn",
            task.step,
        )
    elif task.published and seen < published:
        log.warning(
            "BatchNorm at step 0 sees %d images at a time, the published runs %d; accumulation "
            "does not change that, more images per GPU or more GPUs do",
            *(seen, published),
        )
