"""The one explicit loop: `train_epoch`, `train_step`; knows no method and no data set by name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from base.base_method import BaseMethod, StepContext
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer
from base.batch import Batch
from base.task import Task
from data_loader.data_loaders import IncrementalDataLoader
from models.weights import load_strict
from trainer.advice import after_divergence
from trainer.build import describe, task_record
from trainer.evaluation import Evaluation, Weights
from trainer.loss_meter import Update
from trainer.optim import load_optimizer
from trainer.precision import Precision
from trainer.provenance import Provenance, remarks
from trainer.step_log import StepLog, batch_groups
from utils import checkpoint as files
from utils.errors import UserError
from utils.logger import log, progress
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.random_state import rng_state, set_rng_state
from utils.ranks import Ranks

# The switch by which ranks take over rank 0's BatchNorm statistics has a new name in newer torch.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class Trainer(BaseTrainer):
    """Trains one step."""

    def __init__(
        self,
        config: ConfigParser,
        ranks: Ranks,
        *,
        data: IncrementalDataLoader,
        method: BaseMethod,
        student: BaseModel,
        teacher: BaseModel | None,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        provenance: Provenance,
        previous_state: Mapping[str, torch.Tensor] | None = None,
    ):
        """
        Args:
            config: the effective configuration.
            ranks: this process.
            data: task and loaders.
            method: what the step is trained with.
            student: the model of this step, on the device.
            teacher: the previous step's model, frozen, on the device, if the method needs it.
            optimizer, scheduler: of the student's parameters; stepped once per iteration.
            provenance: where the weights come from, kept in checkpoints.
            previous_state: the previous step's weights as they were loaded, if the method needs
                them.
        """
        self.task: Task = data.task
        self.data, self.method = data, method
        self.student, self.teacher = student, teacher
        self.optimizer, self.scheduler = optimizer, scheduler
        self.provenance, self.previous_state = provenance, previous_state
        self.evaluation = Evaluation(config, ranks, data=data, method=method, student=student)
        reported = self.evaluation.val_evaluator.names()
        super().__init__(config, ranks, [f"val_{name}" for name in reported])

        on_cuda = ranks.device.type == "cuda"
        self.precision = Precision.of(config, ranks.device)
        self.log = StepLog(config, ranks, data)
        self.model: BaseModel | DistributedDataParallel = student
        if ranks.world > 1:
            sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: not student.frozen_bn}
            self.model = DistributedDataParallel(
                student,
                device_ids=[ranks.device] if on_cuda else None,
                **sync_buffers,
            )

    def close(self) -> None:
        """Flush what is logged."""
        self.log.close()

    # ---------------------------------------------------------------------------------- training
    def begin_step(self) -> None:
        """Let the method see the step before its first epoch."""
        with self._aside() as context:
            self.method.begin_step(context)

    def end_step(self) -> None:
        """Let the method see the step after its last epoch."""
        with self._aside() as context:
            self.method.end_step(context)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[StepContext]:
        """What a method works with outside the iterations: no gradients, models in eval mode."""
        self.student.eval()
        with torch.no_grad():
            yield StepContext(
                self.student,
                self.teacher,
                self._batches,
                self.epochs,
                self._total,
                self.previous_state,
            )

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """This rank's training batches of an epoch, on the device; the run may be stopped here."""
        self.data.train_batches.set_epoch(epoch)
        bar = progress(
            self.data.train_loader,
            desc=f"step {self.task.schedule_step}, pass of the method",
            disable=not self.ranks.is_main,
            unit="it",
        )
        for number, sample in enumerate(bar):
            self.ranks.stop_if_asked()
            batch = sample.on(self.ranks.device)
            yield batch._replace(iteration=number // self.data.accumulate)

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training set, or what is left of it after `self.iteration`."""
        data, group = self.data, self.optimizer.param_groups[0]
        data.train_batches.set_epoch(epoch, skip=self.iteration)
        self.model.train()
        # cuDNN tries its ways once on a GPU; where image sizes differ, it would go on trying.
        torch.backends.cudnn.benchmark = data.fixed_size("train")
        advice = after_divergence(self.config, self.task)
        with self.log.epoch(epoch, self.iteration, advice) as log:
            for batches in batch_groups(data.train_loader, data.accumulate):
                lr = group["lr"]
                update = self.train_step(
                    (batch.on(self.ranks.device) for batch in batches), len(batches)
                )
                self.iteration += 1
                read = log.add(self.iteration, update, batches, lr)
                if self.iteration < data.train_batches.iterations:
                    self._stop_between_iterations(read)
            log.losses.read()
            # No loss tells of the last update; validation would make figures of what it left.
            self.require_finite({"weights": self.student.state_dict()}, epoch)

    def _stop_between_iterations(self, read: bool) -> None:
        """Several ranks ask each other only when losses are `read`, for which they wait anyway."""
        if read or self.ranks.world == 1:
            try:
                self.ranks.stop_if_asked()
            except Interrupted:
                self.log.losses.read()  # a checkpoint must not hide a loss that was not finite
                raise

    def train_step(
        self, batches: Iterable[Batch | tuple[torch.Tensor, torch.Tensor]], count: int = 1
    ) -> Update:
        """One iteration: forward, losses and backward of each batch, then the update.

        Args:
            batches: on the device, or their images and labels alone. Several of equal size are
                accumulated: the gradient is the mean.
            count: how many there are.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for number, given in enumerate(batches, start=1):
            batch = Batch(*given)._replace(iteration=self.scheduler.last_epoch)
            with self._synchronised(number == count):
                loss, terms = self._backward(batch, 1 / count)
            values = {"loss": loss, **terms}
            sums = {name: sums[name] + values[name] for name in values} if sums else values
        norm, skipped = self.precision.step(
            self.optimizer, self.config["trainer"]["clip_grad_norm"]
        )
        self.scheduler.step()  # reference quirk: also past an update that was skipped
        return Update(sums.pop("loss"), sums, norm, skipped)

    def _backward(self, batch: Batch, share: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Add the gradients of one batch, weighted by `share`, to the parameters'.

        Returns:
            The loss, and the mean over classes of each term, both times `share`.
        """
        with self.precision.autocast():
            outputs = self.model(batch.images, self.method.wants)
            targets = None
            if self.teacher is not None:
                with torch.no_grad():
                    targets = self.teacher(batch.images, self.method.wants)
        terms = self.method.losses(batch, outputs, targets, self._total)
        weights = self.method.weights
        loss = share * sum(weights[name] * term.sum() for name, term in terms.items())
        self.precision.backward(loss)
        return loss.detach(), {name: share * term.detach().mean() for name, term in terms.items()}

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, without gradient."""
        return self.ranks.sum(values.detach().clone())

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Ranks exchange gradients in the last of the accumulated batches only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    # -------------------------------------------------------------------------------- evaluation
    def validate(self, epoch: int) -> dict[str, float]:
        """Evaluate the validation set; labels are those of the new classes."""
        values = self.evaluation.validate(epoch)
        self.log.board.scalars(values, "val", epoch)
        self.log.board.pictures(self.evaluation, epoch)
        return {f"val_{name}": value for name, value in values.items()}

    def test(self, file: Path, weights: Path) -> None:
        """Evaluate the test set and write `file`, as `Evaluation.test` does."""
        tested = None
        if self.ranks.is_main:
            sha256 = files.weights_hash(self.student.state_dict())
            lengthened = self.provenance.record.get("lengthened", ())
            tested = Weights(weights, self.epoch, sha256, self.provenance.previous, lengthened)
        self.log.board.scalars(self.evaluation.test(file, tested), "test", self.epoch)

    # ------------------------------------------------------------------------------- checkpoints
    def resume(self, stored: files.StoredCheckpoint) -> None:
        super().resume(stored)
        # An epoch that is done but for its validation is told already.
        done = self.iteration == self.data.train_batches.iterations
        if self.ranks.is_main:
            self.log.history.resume(self.epoch + done)

    def state(self) -> dict[str, Any]:
        task = self.task
        return {
            "arch": self.config["arch"]["type"],
            "state_dict": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "rng": self.ranks.gather(rng_state(self.ranks.device)),
            "task": task_record(task),
            "method": self.config["method"],
            "family": self.method.family,
            "method_state": self.method.state(),
            "record": dict(self.provenance.record),
            "data": dict(self.provenance.data),
            "previous": self.provenance.previous,
        }

    def load_state(self, checkpoint: dict[str, Any], path: Path) -> None:
        if checkpoint["task"] != task_record(self.task):
            raise UserError(
                f"the checkpoint to resume from is of {describe(checkpoint['task'])}, but this run "
                f"is {describe(task_record(self.task))}."
            )
        for remark in remarks(self.provenance.record, checkpoint["record"]):
            log.info("resuming with another %s", remark)
        self.provenance = self.provenance.resumed(self.config, checkpoint, path, self.data)
        epoch, iteration = checkpoint["epoch"], checkpoint["iteration"]
        count, at = self.data.train_batches.iterations, checkpoint["lr_scheduler"]["last_epoch"]
        if iteration > count or at != epoch * count + iteration:
            raise UserError(
                f"the checkpoint to resume from: epoch is {epoch}, iteration {iteration} and "
                f"lr_scheduler.last_epoch {at}, which do not go together where an epoch has "
                f"{count} iterations."
            )
        load_strict(self.student, checkpoint["state_dict"], "the checkpoint to resume from")
        self.method.load_state(checkpoint["method_state"])
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        self.precision.load_scale(checkpoint["scaler"])
        states = checkpoint["rng"]
        if not states:
            raise UserError("the checkpoint to resume from: rng is empty.")
        if len(states) == self.ranks.world:
            set_rng_state(states[self.ranks.rank], self.ranks.device)
        else:
            log.warning(
                "the checkpoint was written by %d processes, this run has %d: dropout goes on with "
                "new random numbers",
                len(states),
                self.ranks.world,
            )
