"""How a step starts, decided once: afresh, from a checkpoint, from another run's base step, only
tested, or not at all. Called by `trainer/run.py`, and by entry scripts through `unfinished`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.advice import around_finished
from trainer.build import build_data
from trainer.checks import check
from trainer.record import differences, record
from trainer.steps import METRICS
from utils import checkpoint as files
from utils.distributed import Launch, Ranks
from utils.misc import UserError
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
    if config.global_batch is not None:
        each = plan.world * config["trainer"]["accumulate"]
        batch = max(1, config.global_batch // each)
        config = config.with_values({"data_loader.args.train.batch_size": batch})
    if config.auto and not config.test:
        left = _resolve_auto(config, plan)
        if left is None:
            return None
        config = left
    return Start(config, check(config, plan))


def _resolve_auto(config: ConfigParser, plan: Launch) -> ConfigParser | None:
    """What `-r auto` means for this step: continue, test, start anew, or (None) nothing is left."""
    path, checkpoint, skipped = files.newest_good(config.step_dir())
    if path is None:
        return config.changed(notes=(*skipped, "-r auto: no checkpoint yet, a fresh start"))
    if not checkpoint.get("finished", True):
        return config.changed(resume=path, notes=(*skipped, f"-r auto: {path}"))
    if "record" in checkpoint:
        data = build_data(config, Ranks(0, plan.world, plan.devices[0]))
        differs = differences(record(config, data, None), checkpoint["record"])
        if differs:
            around = around_finished(config, data.task)
            raise UserError(
                f"{config.step_dir()} holds a finished step of another run: {'; '.join(differs)}; "
                f"give the same, or another --name for a new run{around}."
            )
    metrics = config.log_dir() / METRICS
    if not metrics.is_file():
        notes = (*skipped, "-r auto: the step is trained, its test is left")
        return config.changed(test=True, notes=notes)
    print(f"{config.step_dir()} is finished, see {metrics}: nothing to do")
    return None
