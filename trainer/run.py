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
from trainer.build import (
    Previous,
    apply_fast,
    build_data,
    build_method,
    build_student,
    load_previous,
)
from trainer.checks import check_names, with_settings
from trainer.evaluation import Evaluation, Weights
from trainer.memory import replay
from trainer.optim import build_optimizer, build_scheduler
from trainer.record import Provenance, check_data
from trainer.results import METRICS, retire, tested_weights
from trainer.start import Start, check_later, decide
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils import interrupt
from utils.distributed import Launch, Ranks, launch, plan_launch
from utils.files import sha256, write_json
from utils.interrupt import Interrupted
from utils.logger import close_logger, log, setup_logger
from utils.parse_config import ConfigParser
from utils.seeds import seed_from


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
        if job is None:
            return
        if job.plan.distributed:
            files.forget()  # the ranks read for themselves
        launch(work, job, job.plan)


class Job(NamedTuple):
    """What is to be done: by which processes, which steps, and how the first of them starts."""

    plan: Launch
    steps: tuple[ConfigParser, ...]
    first: Start


def prepare(steps: Sequence[ConfigParser]) -> Job | None:
    """Whatever can be wrong before anything is allocated or written.

    Returns:
        What is to be done, from the first step that is not finished; None when all are.

    Raises:
        UserError: something is wrong.
    """
    steps = tuple(map(with_settings, steps))
    for config in steps:
        check_names(config)
    plan = plan_launch(steps[0])
    for number, config in enumerate(steps):
        if (start := decide(config, plan)) is not None:
            check_later(steps[number + 1 :], plan)
            return Job(plan, steps[number:], start)
        files.forget(go_on=True)
    return None


def work(job: Job, ranks: Ranks) -> None:
    """One process of a run: the steps in turn."""
    plan, steps, first = job
    run_step(first, ranks)
    for config in steps[1:]:
        gc.collect()  # the networks of the step before are in cycles
        if ranks.any(interrupt.asked() is not None):
            raise Interrupted(f"stopped between steps: {interrupt.asked() or 'by a signal'}.")
        interrupt.stop_deferring()  # what comes before the first iteration can be torn apart
        with files.remembered():
            start = decide(config, plan) if ranks.is_main else None
            start = ranks.gather(start)[0]
            if start is not None:
                run_step(start, ranks)


def run_step(start: Start, ranks: Ranks) -> None:
    """Train or evaluate one step."""
    config = start.config
    step, results = config.step_dir(), config.log_dir()
    held = step  # what no other process may write to meanwhile
    if config.test and config.resume is not None:
        held = results = evaluation_dir(config)
    setup_logger(results / "info.log", config["trainer"]["verbosity"], ranks.is_main)
    try:
        with files.claim(held, results) if ranks.is_main else nullcontext():
            for note in config.notes:
                log.info("%s", note)
            if start.weights is not None:
                evaluate(config, ranks, start.weights, results)
            elif config.base is not None:
                weights = adopt(config, config.base, ranks, build_data(config, ranks))
                evaluate(config.changed(test=True), ranks, weights, results)
            else:
                train(config, ranks, results)
    finally:
        close_logger()


def evaluation_dir(config: ConfigParser) -> Path:
    """Where the test of the weights of `-r` goes.

    Only a finished run's own test is the step's result, by which scripts know that it is done.
    Those of other weights lie apart, by what the files hold, however they are named.
    """
    assert config.resume is not None
    return config.log_dir() / "eval" / f"{config.resume.stem}-{sha256(config.resume)[:12]}"


def train(config: ConfigParser, ranks: Ranks, results: Path) -> None:
    """Train a step, test it and write `metrics.json` into the folder `results`."""
    data = build_data(config, ranks)
    task = data.task
    method = build_method(config, task)
    announce(config, ranks, method, data)
    # Whatever is wrong with a list or an image set is told now, not after the last epoch.
    data.setup("train", "val", "test")

    torch.manual_seed(seed_from(config["seed"], task.step, "weights"))
    student = build_student(config, method, ranks)
    previous = load_previous(config, method, student) if task.step > 0 else Previous()
    check_data(data, previous, ranks)
    fresh = config.resume is None
    if ranks.is_main and fresh:
        retire(results, trained_anew=True)
        retire(config.step_dir(), trained_anew=True)
    student.to(ranks.device)
    if task.step > 0 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
        replay(config, ranks, data, method, student)
    iterations = data.train_batches.iterations
    announce_statistics(config, data, student)
    log.info("%s", data.leakage())
    provenance = ranks.gather(Provenance.of(config, data, previous) if ranks.is_main else None)[0]
    method.start(student, previous.method_state)
    if ranks.world > 1 and ranks.device.type == "cuda" and not student.frozen_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = previous.teacher
    if teacher is not None:
        teacher.to(ranks.device)
    apply_fast(config, student, teacher, trains=True)
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
        provenance=provenance,
        previous_state=previous.state if method.needs_previous_state else None,
    )
    if config.resume is not None:
        trainer.resume(config.resume)
    files.forget()
    del previous
    if ranks.is_main:
        retire(results, trained_anew=False)
        write_json(config.step_dir() / "config.json", config.as_dict())
    try:
        interrupt.defer()  # ranks stop together, after an iteration or a batch
        trainer.train()
        weights = config.step_dir() / files.epoch_file(trainer.epoch)
        trainer.test(results / METRICS, weights)
    finally:
        trainer.close()


def evaluate(config: ConfigParser, ranks: Ranks, weights: Path, results: Path) -> None:
    """Test a weight file and write `metrics.json`: the path of training, left after the load."""
    data = build_data(config, ranks)
    method = build_method(config, data.task)
    announce(config, ranks, method, data)
    data.setup("test")
    checkpoint = files.load(weights)
    student = build_student(config, method, ranks)
    load_strict(student, checkpoint["state_dict"], f"weight file {weights}")
    tested = Weights.of(checkpoint, weights) if ranks.is_main else None
    files.forget()
    student.to(ranks.device)
    apply_fast(config, student, trains=False)
    evaluation = Evaluation(config, ranks, data=data, method=method, student=student)
    metrics = results / METRICS
    if tested is not None and tested_weights(metrics) != tested.sha256:
        retire(results, trained_anew=False)
    interrupt.defer()
    evaluation.test(metrics, tested)
