"""The only wiring: config → task and data → model, teacher → method → optimizer → trainer.

Called by the four entry scripts; training and evaluation are the same path, which evaluation leaves
after the weights are loaded. What is checked stands in `trainer/checks.py`, how a step starts in
`trainer/start.py`, how its parts are built in `trainer/build.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models.weights import load_strict
from trainer.announce import announce, announce_statistics
from trainer.base_step import adopt
from trainer.build import apply_fast, build_data, build_method, build_student, load_previous
from trainer.checks import check_names, with_settings
from trainer.evaluation import Evaluation
from trainer.memory import replay
from trainer.optim import build_optimizer, build_scheduler
from trainer.record import record
from trainer.start import Start, decide
from trainer.steps import METRICS
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils import interrupt
from utils.distributed import Launch, Ranks, launch, plan_launch
from utils.logger import close_logger, log, setup_logger
from utils.misc import Interrupted, seed_from, sha256, write_json
from utils.parse_config import ConfigParser


def run(*steps: ConfigParser) -> None:
    """Check the configuration, then train or evaluate in as many processes as it asks for.

    Args:
        steps: of one task, one after the other; each as if it were called alone.

    Raises:
        UserError: whatever is wrong with the first step, before anything is allocated or written;
            with a later one, before that is.
        Interrupted: a signal stopped the run.
    """
    with files.remembered():
        job = prepare(steps)
        if job.plan.distributed:
            files.forget()  # the ranks read for themselves
        if job.first is not None or len(steps) > 1:
            launch(work, job, job.plan)


class Job(NamedTuple):
    """What is to be done: by which processes, which steps, and how the first of them starts."""

    plan: Launch
    steps: tuple[ConfigParser, ...]
    first: Start | None


def prepare(steps: Sequence[ConfigParser]) -> Job:
    """Whatever can be wrong before anything is allocated or written.

    Raises:
        UserError: it is.
    """
    steps = tuple(map(with_settings, steps))
    for config in steps:
        check_names(config)
    plan = plan_launch(steps[0])
    return Job(plan, steps, decide(steps[0], plan))


def work(job: Job, ranks: Ranks) -> None:
    """One process of a run: the steps in turn."""
    plan, steps, start = job
    for number, config in enumerate(steps):
        if number:
            gc.collect()  # the networks of the step before are in cycles
            if ranks.any(interrupt.asked() is not None):
                raise Interrupted(f"stopped between steps: {interrupt.asked() or 'by a signal'}.")
            with files.remembered():
                start = decide(config, plan) if ranks.is_main else None
                start = ranks.gather(start)[0]
                run_step(start, ranks)
        else:
            run_step(start, ranks)


def run_step(start: Start | None, ranks: Ranks) -> None:
    """Train or evaluate one step, or, where nothing is left, do nothing."""
    if start is None:
        return
    config = start.config
    log_dir = config.log_dir()
    if config.test and config.resume is not None:
        log_dir = evaluation_dir(config)
    setup_logger(log_dir / "info.log", config["trainer"]["verbosity"], ranks.is_main)
    metrics = log_dir / METRICS
    writes = ranks.is_main and not config.test
    try:
        with files.claim(config.step_dir()) if writes else nullcontext():
            for note in config.notes:
                log.info("%s", note)
            if start.weights is not None:
                evaluate(config, ranks, start.weights, metrics)
            elif config.base is not None:
                weights = adopt(config, config.base, ranks, build_data(config, ranks))
                evaluate(config.changed(test=True), ranks, weights, metrics)
            else:
                train(config, ranks, metrics)
    finally:
        close_logger()


def evaluation_dir(config: ConfigParser) -> Path:
    """Where the test of the weights of `-r` goes.

    Only a finished run's own test is the step's result, by which scripts know that it is done.
    Those of other weights lie apart, by what the files hold, however they are named.
    """
    assert config.resume is not None
    return config.log_dir() / "eval" / f"{config.resume.stem}-{sha256(config.resume)[:12]}"


def train(config: ConfigParser, ranks: Ranks, metrics: Path) -> None:
    """Train a step, test it and write `metrics`, a `metrics.json`."""
    data = build_data(config, ranks)
    task = data.task
    method = build_method(config, task)
    announce(config, ranks, method, data)
    # Whatever is wrong with a list or an image set is told now, not after the last epoch.
    data.setup("train", "val", "test")

    torch.manual_seed(seed_from(config["seed"], task.step, "weights"))
    student = build_student(config, method, ranks)
    teacher, earlier = load_previous(config, method, student) if task.step > 0 else (None, {})
    student.to(ranks.device)
    if task.step > 0 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
        replay(config, ranks, data, method, student)
    iterations = data.train_batches.iterations
    announce_statistics(config, data, student)
    log.info("%s", data.leakage())
    method.start(student, earlier)
    if ranks.world > 1 and ranks.device.type == "cuda" and not student.frozen_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if teacher is not None:
        teacher.to(ranks.device)
    apply_fast(config, student, teacher, trains=True)
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, config["trainer"]["epochs"] * iterations)
    torch.manual_seed(seed_from(config["seed"], task.step, "dropout", ranks.rank))
    train_hash = ranks.gather(data.train_hash() if ranks.is_main else None)[0]
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
    files.forget()
    if ranks.is_main:
        write_json(config.step_dir() / "config.json", config.as_dict())
    try:
        interrupt.defer()  # ranks stop together, after an iteration or a batch
        trainer.train()
        weights = config.step_dir() / files.epoch_file(trainer.epoch)
        trainer.test(metrics, str(weights))
    finally:
        trainer.close()


def evaluate(config: ConfigParser, ranks: Ranks, weights: Path, metrics: Path) -> None:
    """Test a weight file and write `metrics`: the path of training, left after the load."""
    data = build_data(config, ranks)
    method = build_method(config, data.task)
    announce(config, ranks, method, data)
    data.setup("test")
    checkpoint = files.load(weights)
    student = build_student(config, method, ranks)
    load_strict(student, checkpoint["state_dict"], f"weight file {weights}")
    files.forget()
    student.to(ranks.device)
    apply_fast(config, student, trains=False)
    evaluation = Evaluation(config, ranks, data=data, method=method, student=student)
    interrupt.defer()
    evaluation.test(metrics, str(weights), int(checkpoint.get("epoch", 0)))
