"""The frame around the training loop: epochs, when to validate and save, resume, best-so-far.

`trainer/trainer.py` fills in what an epoch is. Knows no model, loss or data.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import checkpoint as files
from utils.checkpoint_form import FORM, TRAINING_STATE, not_finite
from utils.errors import UserError, choose, listing
from utils.forms import Maybe, fault
from utils.kept import strip_kept, without_state
from utils.logger import log
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.ranks import Ranks


def parse_monitor(text: str, valid: Sequence[str]) -> tuple[str, str] | None:
    """`"max NAME"` → ("max", NAME); "off" → None.

    Raises:
        UserError: another form, or a name that no validation reports.
    """
    if text == "off":
        return None
    mode, _, name = text.partition(" ")
    if mode not in ("max", "min") or not name:
        raise UserError(
            f'trainer.monitor is \'{text}\'; it must be "off", "max NAME" or "min NAME" with '
            f"NAME one of {listing(valid)}."
        )
    return mode, choose("the name in trainer.monitor", name, valid)


class BaseTrainer(ABC):
    """Runs the epochs of a step. What a subclass implements may raise `Interrupted` when a rank was
    asked to stop: `train_epoch` after a whole iteration.
    """

    def __init__(self, config: ConfigParser, ranks: Ranks, monitored: Sequence[str]):
        """
        Args:
            config: its `trainer` block decides.
            ranks: only rank 0 writes files.
            monitored: names of the values that `validate` returns.
        """
        trainer = config["trainer"]
        self.config, self.ranks = config, ranks
        self.epochs = trainer["epochs"]
        self.epoch = 0  # the last one that is done
        self.iteration = 0  # of the next epoch, the iterations that are done
        self.save_period, self.keeps_all = trainer["save_period"], trainer["keep"] == "all"
        self.validation_period = trainer["validation_period"]
        self.early_stop = trainer["early_stop"]
        self.monitor = parse_monitor(trainer["monitor"], monitored)
        self.best: float | None = None
        self.since_best = 0  # validations since the best one
        self.folder = config.step_dir()

    @abstractmethod
    def begin_step(self) -> None:
        """What precedes the first epoch of a fresh start."""

    @abstractmethod
    def end_step(self) -> None:
        """What follows the last epoch, before the final checkpoint."""

    @abstractmethod
    def train_epoch(self, epoch: int) -> None:
        """One pass over the training set, from `iteration` on, which it keeps up to date."""

    @abstractmethod
    def validate(self, epoch: int) -> dict[str, float]:
        """Values of the validation set by name, in percent."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides `epoch`, `monitor_best` and the end of the run.

        Called on every rank; tensors and plain values only.
        """

    @abstractmethod
    def load_state(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Take over what `state` returned, from the file `path`."""

    @property
    def stalled(self) -> bool:
        """Whether `early_stop` validations in a row brought no new best."""
        return 0 < self.early_stop <= self.since_best

    def train(self) -> None:
        """Train the epochs that are left. To be called with signals deferred.

        Raises:
            Interrupted: a signal asked to stop; `last.pth` holds the place inside the epoch.
        """
        try:
            self._train()
        except Interrupted as stop:
            if self.iteration:  # else the end of the epoch is saved already
                self._save(finished=False, improved=False)
            self.ranks.barrier()  # no rank ends, and has the others ended, before it is saved
            raise Interrupted(
                f"{stop} Epoch {self.epoch} is done and iteration {self.iteration} of the next: "
                "continue with -r auto."
            ) from None

    def _train(self) -> None:
        if (self.epoch, self.iteration) == (0, 0):
            self.begin_step()
        for epoch in range(self.epoch + 1, self.epochs + 1):
            if self.stalled:
                break
            self.train_epoch(epoch)
            last = epoch == self.epochs
            validates = last or self._due(epoch, self.validation_period)
            values = self.validate(epoch) if validates else None
            improved = values is not None and self._judge(values)
            finished = last or self.stalled
            if finished:
                self.end_step()
            self.epoch, self.iteration = epoch, 0
            self._save(finished=finished, improved=improved)
            if not finished:
                self.ranks.stop_if_asked()
        if self.monitor is not None and self.stalled:
            log.info(
                "no better %s in %d validations: the step ended after epoch %d",
                self.monitor[1],
                self.since_best,
                self.epoch,
            )

    def resume(self, stored: files.StoredCheckpoint) -> None:
        """Continue from a full checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, or holds weights only, or is of another form.
        """
        path, checkpoint = stored.path, stored.content
        if checkpoint.get("finished") and not TRAINING_STATE & checkpoint.keys():
            raise UserError(
                f"checkpoint {path} is of a finished step, of which trainer.keep kept the weights "
                "alone: training cannot go on from it; use it with eval, or train the step anew "
                "under another --name (with --set trainer.keep=all a finished step can be "
                "lengthened)."
            )
        missing = [
            key
            for key, form in FORM.items()
            if key not in checkpoint and not isinstance(form, Maybe)
        ]
        if missing:
            raise UserError(
                f"checkpoint {path} has no {listing(missing)}: it was not written by this project "
                "as a place to continue from; use it with eval, or train the step anew."
            )
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        if wrong := fault(checkpoint, FORM) or not_finite(rest):
            raise UserError(f"checkpoint {path} cannot be continued from: {wrong}.")
        behind, within = checkpoint["epoch"], checkpoint["iteration"]
        if checkpoint["since_best"] > behind:
            raise UserError(
                f"checkpoint {path} cannot be continued from: since_best is "
                f"{checkpoint['since_best']}, but only {behind} epochs are behind it."
            )
        if behind + (within > 0) > self.epochs:
            more = f" and {within} iterations of the next" if within else ""
            raise UserError(
                f"checkpoint {path} has {behind} epochs{more} behind it, but trainer.epochs "
                f"(--epochs) is {self.epochs}; give at least as many."
            )
        self.load_state(checkpoint, path)
        self.epoch, self.iteration = behind, within
        if self.config["trainer"]["reset_best_mnt"]:
            log.info("the best value so far is forgotten (trainer.reset_best_mnt)")
        else:
            self.best, self.since_best = checkpoint["monitor_best"], checkpoint["since_best"]
        place = f" and iteration {within} of the next" if within else ""
        log.info("resumed from %s: epoch %d is done%s", path, self.epoch, place)

    @staticmethod
    def _due(epoch: int, period: int) -> bool:
        return period > 0 and epoch % period == 0

    def _judge(self, values: dict[str, float]) -> bool:
        """Compare the monitored value with the best one; True when it is better."""
        if self.monitor is None:
            return False
        mode, name = self.monitor
        value = values[name]
        sign = 1 if mode == "max" else -1
        if self.best is not None and sign * value <= sign * self.best:
            self.since_best += 1
            return False
        log.info("best %s so far: %.2f", name, value)
        self.best, self.since_best = value, 0
        return True

    def require_finite(self, values: Mapping[str, Any], epoch: int) -> None:
        """End the step, on all ranks, where a value is not finite on one of them.

        Args:
            values: of a checkpoint, by name; all ranks call it alike.
            epoch: in which they came about.

        Raises:
            UserError: with step, epoch, names, and the ways on.
        """
        faults = next(filter(None, self.ranks.gather(not_finite(values))), None)
        if faults is None:
            return
        step = self.config["data_loader"]["args"]["task"]["step"]
        lower = "a lower learning rate (--lr) or --set trainer.clip_grad_norm=1"
        ways = f"Start the step again with {lower}."
        last = self.folder / files.LAST
        if last.is_file():
            ways = (
                f"The checkpoint before, {last}, is intact: python {Path(sys.argv[0]).name} -r "
                f"{last} goes on from it with the same settings. Others make another run: give "
                f"{lower}, and another --name."
            )
        raise UserError(f"in step {step}, epoch {epoch}, {faults}. {ways}")

    def _save(self, *, finished: bool, improved: bool) -> None:
        checkpoint = {
            **self.state(),
            "epoch": self.epoch,
            "iteration": self.iteration,
            "monitor_best": self.best,
            "since_best": self.since_best,
            "finished": finished,
        }
        # What is not finite never takes the place of a good checkpoint.
        self.require_finite(checkpoint, self.epoch + (self.iteration > 0))
        if not self.ranks.is_main:
            return
        if finished and not self.keeps_all:
            strip_kept(self.folder)
            checkpoint = without_state(checkpoint)
        last = files.save_last(self.folder, checkpoint)
        if self.iteration:
            log.info("saved %s, inside epoch %d", last, self.epoch + 1)
            return
        if finished or self._due(self.epoch, self.save_period):
            files.keep(last, files.epoch_file(self.epoch))
            log.info("saved %s", self.folder / files.epoch_file(self.epoch))
        if improved:
            files.keep(last, files.BEST)
        if finished:  # nothing goes on from the one before
            (self.folder / files.PREVIOUS).unlink(missing_ok=True)
