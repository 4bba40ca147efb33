"""A run: each step that is left, in as many processes as it asks for.

The only wiring: config → task and data → model, teacher → method → optimizer → trainer. Training
and evaluation are the same path, which evaluation leaves after the weights are loaded.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from trainer.announce import announce, announce_statistics
from trainer.build import (
    Previous,
    apply_fast,
    build_data,
    build_method,
    build_student,
    load_previous,
    load_student,
)
from trainer.evaluation import Evaluation, Weights
from trainer.optim import build_optimizer, build_scheduler
from trainer.plan import RunPlan, StepPlan, plan_run, plan_step
from trainer.provenance import Provenance, check_data
from trainer.replay import replay
from trainer.results import METRICS, retire, tested_weights
from trainer.shared_step import adopt
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.files import sha256, write_json
from utils.kept import remove_earlier
from utils.logger import close_logger, log, setup_logger
from utils.parse_config import ConfigParser
from utils.processes import signals
from utils.processes.launch import launch
from utils.processes.signals import Interrupted
from utils.ranks import Ranks
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
    plan = plan_run(steps)
    if plan is None:
        return
    if plan.launch.distributed:
        plan.first.release()  # the ranks read for themselves
    launch(work, plan, plan.launch)


def work(plan: RunPlan, ranks: Ranks) -> None:
    """One process of a run: the steps in turn."""
    run_step(plan.first, ranks)
    for config in plan.later:
        gc.collect()  # the networks of the step before are in cycles
        if ranks.any(signals.pending_signal() is not None):
            raise Interrupted(
                f"stopped between steps: {signals.pending_signal() or 'by a signal'}."
            )
        signals.stop_deferring()  # what comes before the first iteration can be torn apart
        step = plan_step(config, plan.launch) if ranks.is_main else None
        plans = ranks.gather(step)
        run_step(step or plans[0], ranks)


def run_step(plan: StepPlan, ranks: Ranks) -> None:
    """Do for one step what its plan says."""
    config, checkpoint = plan.config, plan.checkpoint
    if plan.action == "nothing":
        return
    held, results = config.step_dir(), config.log_dir()
    if plan.action == "test" and config.call.resume is not None:
        held = results = evaluation_dir(config, config.call.resume)
    setup_logger(results / "info.log", config["trainer"]["verbosity"], ranks.is_main)
    try:
        # No other process may write to what is held meanwhile.
        with files.claim(held, results) if ranks.is_main else nullcontext():
            for note in config.notes:
                log.info("%s", note)
            if plan.action in ("train", "continue"):
                train(plan, ranks, results)
                return
            assert plan.action in ("adopt", "test"), plan.action
            assert checkpoint is not None, "only training starts without one"
            if plan.action == "adopt":
                checkpoint = adopt(config, ranks, checkpoint, build_data(config, ranks))
                plan.release()
            evaluate(config, ranks, checkpoint, results)
            if ranks.is_main and results == config.log_dir():
                remove_earlier(config)
    finally:
        close_logger()


def evaluation_dir(config: ConfigParser, weights: Path) -> Path:
    """Where the test of weights that were named with `-r` goes.

    Only a finished run's own test is the step's result, by which scripts know that it is done.
    Those of other weights lie apart, by what the files hold, however they are named.
    """
    return config.log_dir() / "eval" / f"{weights.stem}-{sha256(weights)[:12]}"


def train(plan: StepPlan, ranks: Ranks, results: Path) -> None:
    """Train a step, test it and write `metrics.json` into the folder `results`."""
    config = plan.config
    trainer = build_trainer(plan, ranks, results)
    plan.release()
    if ranks.is_main:
        retire(results, trained_anew=False)
        write_json(config.step_dir() / "config.json", config.as_dict())
    try:
        signals.defer_signals()  # ranks stop together, after an iteration or a batch
        trainer.train()
        weights = config.step_dir() / files.epoch_file(trainer.epoch)
        trainer.test(results / METRICS, weights)
        if ranks.is_main:
            remove_earlier(config)
    finally:
        trainer.close()


def build_trainer(plan: StepPlan, ranks: Ranks, results: Path) -> Trainer:
    """Everything that a step's training needs, where it starts or goes on."""
    config, fresh = plan.config, plan.action == "train"

    # ------------------------------------------------------------------------ data and method
    data = build_data(config, ranks)
    task = data.task
    method = build_method(config, task)
    announce(config, ranks, method, data, trains=True)
    # Whatever is wrong with a list or an image set is told now, not after the last epoch.
    data.setup("train", "val", "test")

    # ------------------------------------------------------- student, and where it starts from
    torch.manual_seed(seed_from(config["seed"], task.step, "weights"))
    student = build_student(config, method, ranks, from_imagenet=fresh and task.step == 0)
    previous = Previous()
    if plan.previous is not None:
        previous = load_previous(config, method, student, plan.previous)
    check_data(data, previous, ranks)
    if ranks.is_main and fresh:
        retire(results, trained_anew=True)
        retire(config.step_dir(), trained_anew=True)
    student.to(ranks.device)

    # -------------------------------------------------- what it replays, and all it learns from
    if task.step > 0 and config["data_loader"]["args"]["memory"]["mem_size"] > 0:
        replay(config, ranks, data, method, student, resumed=not fresh)
    iterations = data.train_batches.iterations
    announce_statistics(config, data, student)
    log.info("%s", data.leakage())
    provenance = ranks.gather(Provenance.of(config, data, previous) if ranks.is_main else None)[0]

    # ------------------------------------------------------------------------------- networks
    method.start(student, previous.method_state)
    if ranks.world > 1 and ranks.device.type == "cuda" and not student.frozen_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if previous.teacher is not None:
        previous.teacher.to(ranks.device)
    apply_fast(config, student, previous.teacher, trains=True)

    # ------------------------------------------------------------------- optimizer and trainer
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, config["trainer"]["epochs"] * iterations)
    torch.manual_seed(seed_from(config["seed"], task.step, "dropout", ranks.rank))
    trainer = Trainer(
        config,
        ranks,
        data=data,
        method=method,
        student=student,
        teacher=previous.teacher,
        optimizer=optimizer,
        scheduler=scheduler,
        provenance=provenance,
        previous_state=previous.state if method.needs_previous_state else None,
    )
    if plan.checkpoint is not None:
        trainer.resume(plan.checkpoint)
    return trainer


def evaluate(config: ConfigParser, ranks: Ranks, weights: StoredCheckpoint, results: Path) -> None:
    """Test a weight file and write `metrics.json`: the path of training, left after the load."""
    data = build_data(config, ranks)
    method = build_method(config, data.task)
    announce(config, ranks, method, data, trains=False)
    data.setup("test")
    student = load_student(config, method, weights)
    tested = Weights.of(weights.content, weights.path) if ranks.is_main else None
    weights.release()
    student.to(ranks.device)
    apply_fast(config, student, trains=False)
    evaluation = Evaluation(config, ranks, data=data, method=method, student=student)
    metrics = results / METRICS
    if tested is not None and tested_weights(metrics) != tested.sha256:
        retire(results, trained_anew=False)
    signals.defer_signals()
    evaluation.test(metrics, tested)
