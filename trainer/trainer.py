"""The one explicit loop: `train_epoch`, `train_step`; no method or data set by name.

Made by `trainer/run.py` with everything it works on. What evaluates is `trainer/evaluation.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
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
from data_loader.dataset import Sample
from models.weights import load_strict
from trainer.advice import after_divergence
from trainer.build import describe, task_record
from trainer.evaluation import Evaluation, Weights
from trainer.events import Events
from trainer.optim import load_optimizer
from trainer.precision import Precision
from trainer.record import Provenance, remarks
from utils import checkpoint as files
from utils.errors import UserError
from utils.history import History
from utils.logger import log, progress
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.ranks import Ranks

READ_EVERY = 20  # iterations between two looks at the loss on a GPU, each of which waits for it
# Each skipped update halves the loss scale. Twenty in a row bring it from the 65,536 it starts with
# to 1/16, where it has long stopped to lift anything: what still overflows is the run itself.
MOST_SKIPPED = 20


# The switch by which ranks take over rank 0's BatchNorm statistics has a new name in newer torch.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def _grouped(loader: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """The batches of a loader, `size` at a time."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


class LossLog:
    """Loss terms of an epoch, left on the device and read every few iterations."""

    def __init__(self, every: int):
        """
        Args:
            every: iterations between reads.
        """
        self.every = every
        self.in_a_row = 0  # updates skipped since the last one that was made
        self.begin("")

    def begin(self, where: str, advice: str = "") -> None:
        """Start an epoch.

        Args:
            where: step and epoch, for messages.
            advice: how to go on where the run ends by a loss that is not finite.
        """
        self.where, self.advice = where, advice
        self.names: tuple[str, ...] = ()
        self.waiting: list[tuple[int, Sequence[str], torch.Tensor]] = []
        self.total, self.recent = torch.zeros(0), torch.zeros(0)
        self.count = self.skipped = 0  # updates that were made, and those that were not

    def add(self, iteration: int, terms: dict[str, torch.Tensor], images: Sequence[str]) -> bool:
        """Take what `Trainer.train_step` returned for an iteration; True when it was read."""
        self.names = tuple(terms)
        self.waiting.append((iteration, images, torch.stack(list(terms.values()))))
        if len(self.waiting) < self.every:
            return False
        self.read()
        return True

    def read(self) -> None:
        """Fetch what waits on the device.

        Raises:
            UserError: a loss is not finite and no loss scale skips the update, or too many updates
                in a row were skipped; names step, iteration, terms and images.
        """
        if not self.waiting:
            return
        values = torch.stack([value for *_, value in self.waiting]).double().cpu()
        scaled = self.names[-1] == "skipped"
        made = values[:, -1] == 0 if scaled else torch.ones(len(values), dtype=torch.bool)
        for (iteration, images, _), row, updated in zip(self.waiting, values, made, strict=True):
            finite = bool(row.isfinite().all())
            if updated and finite:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, row, strict=True))
            fault = "the loss is" if not finite else "the gradients in float16 are"
            place = f"{fault} not finite at {self.where}, iteration {iteration}"
            which = f"{terms}; images of the batch: {', '.join(images)}"
            if not scaled or self.in_a_row == MOST_SKIPPED:
                times = f", the last of {MOST_SKIPPED} in a row" if scaled else ""
                raise UserError(
                    f"{place}{times}: {which}; lower the learning rate (--lr), set "
                    'trainer.clip_grad_norm, or with mixed precision try "amp_dtype": "bfloat16"'
                    f"{'; ' if self.advice else ''}{self.advice}."
                )
            told = f": {which}" if not finite else ""
            log.log(
                logging.INFO if finite else logging.WARNING,
                "%s, so the update is skipped and the loss scale halved (%d in a row; %d end the "
                "run)%s",
                place,
                self.in_a_row,
                MOST_SKIPPED,
                told,
            )
        self.skipped += len(values) - int(made.sum())
        if made.any():
            self.total = values[made].sum(0) + (self.total if self.count else 0)
            self.recent = values[made].mean(0)
            self.count += int(made.sum())
        self.waiting.clear()

    def means(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Mean of each term over the updates read so far, of all `ranks` when given."""
        total = self.total / self.count
        if ranks is not None:
            total = ranks.sum(total.to(ranks.device)) / ranks.world
        return self._named(total)

    def latest(self) -> dict[str, float]:
        """Mean of each term over the updates of the last read that had one."""
        return self._named(self.recent)

    def _named(self, values: torch.Tensor) -> dict[str, float]:
        named = dict(zip(self.names, values.tolist(), strict=True)) if self.count else {}
        return {name: value for name, value in named.items() if name != "skipped"}


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
        self.history = History(config.log_dir(), ranks.device)
        self.losses = LossLog(READ_EVERY if on_cuda else 1)
        self.model: BaseModel | DistributedDataParallel = student
        if ranks.world > 1:
            sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: not student.frozen_bn}
            self.model = DistributedDataParallel(
                student,
                device_ids=[ranks.device] if on_cuda else None,
                **sync_buffers,
            )
        self.events = Events(config, ranks)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        self.events.close()

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
        count = self.data.train_batches.iterations
        self.data.train_batches.set_epoch(epoch, skip=self.iteration)
        self.model.train()
        # cuDNN tries its ways once on a GPU; where image sizes differ, it would go on trying.
        torch.backends.cudnn.benchmark = self.data.one_size("train")
        losses = self.losses
        where = f"step {self.task.schedule_step}, epoch {epoch}"
        losses.begin(where, after_divergence(self.config, self.task))
        start, images, lr = time.perf_counter(), 0, self.optimizer.param_groups[0]["lr"]
        whole = self.iteration == 0
        bar = progress(
            total=count,
            initial=self.iteration,
            desc=f"step {self.task.schedule_step} epoch {epoch}/{self.epochs}",
            disable=not self.ranks.is_main,
            unit="it",
        )
        with bar:
            for batches in _grouped(self.data.train_loader, self.data.accumulate):
                lr = self.optimizer.param_groups[0]["lr"]
                names = [name for batch in batches for name in batch.name]
                on_device = (batch.on(self.ranks.device) for batch in batches)
                terms = self.train_step(on_device, len(batches))
                self.iteration += 1
                images += len(names) * self.ranks.world
                if losses.add(self.iteration, terms, names):
                    rate = images / (time.perf_counter() - start)
                    shown = {"lr": f"{lr:.2e}", "images_per_s": f"{rate:.1f}"}
                    if losses.count:
                        shown = {"loss": f"{losses.means()['loss']:.3f}"} | shown
                    bar.set_postfix(shown, refresh=False)
                    at = (epoch - 1) * count + self.iteration
                    self.events.scalars(losses.latest() | {"lr": lr}, "train", at)
                bar.update()
                if self.iteration < count:
                    self._stop_between_iterations(losses)
        losses.read()
        # No loss tells of the last update; validation would make figures of what it left.
        self.require_finite({"weights": self.student.state_dict()}, epoch)
        if not images:  # the run was stopped after the last iteration of the epoch
            return
        seconds = time.perf_counter() - start
        means = losses.means(self.ranks) if losses.count else {}
        if self.ranks.is_main:
            told = {"lr": lr, "images_per_s": images / seconds, "seconds": seconds, "whole": whole}
            self.history.add(self.data.global_batch, epoch=epoch, losses=means, **told)
        log.info(
            "epoch %d/%d: %slr %.3e, %s%.1f images/s, %.0f s",
            epoch,
            self.epochs,
            "".join(f"{name} {value:.4f}, " for name, value in means.items()),
            lr,
            f"{losses.skipped} updates skipped, " if losses.skipped else "",
            images / seconds,
            seconds,
        )

    def _stop_between_iterations(self, losses: LossLog) -> None:
        try:
            self.ranks.stop_if_asked()
        except Interrupted:
            losses.read()  # a checkpoint must not hide a loss that was not finite
            raise

    def train_step(
        self, batches: Iterable[Batch | tuple[torch.Tensor, torch.Tensor]], count: int = 1
    ) -> dict[str, torch.Tensor]:
        """One iteration: forward, losses and backward of each batch, then the update.

        Args:
            batches: on the device, or their images and labels alone. Several of equal size are
                accumulated: the gradient is the mean.
            count: how many there are.

        Returns:
            `loss`, the weighted sum, the mean over classes of each term, and what
            `Precision.step` tells: scalars that stay on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for number, given in enumerate(batches, start=1):
            batch = Batch(*given)._replace(iteration=self.scheduler.last_epoch)
            with self._synchronised(number == count):
                terms = self._gradients(batch, 1 / count)
            sums = {name: sums[name] + terms[name] for name in terms} if sums else terms
        told = self.precision.step(self.optimizer, self.config["trainer"]["clip_grad_norm"])
        self.scheduler.step()  # reference quirk: also past an update that was skipped
        return sums | told

    def _gradients(self, batch: Batch, share: float) -> dict[str, torch.Tensor]:
        """Add the gradients of one batch, weighted by `share`, to the parameters'."""
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
        means = {name: share * term.detach().mean() for name, term in terms.items()}
        return {"loss": loss.detach()} | means

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
        self.events.scalars(values, "val", epoch)
        self.events.pictures(self.evaluation, epoch)
        return {f"val_{name}": value for name, value in values.items()}

    def test(self, file: Path, weights: Path) -> None:
        """Evaluate the test set and write `file`, as `Evaluation.test` does."""
        tested = None
        if self.ranks.is_main:
            sha256 = files.weights_hash(self.student.state_dict())
            lengthened = self.provenance.record.get("lengthened", ())
            tested = Weights(weights, self.epoch, sha256, self.provenance.previous, lengthened)
        self.events.scalars(self.evaluation.test(file, tested), "test", self.epoch)

    # ------------------------------------------------------------------------------- checkpoints
    def resume(self, stored: files.StoredCheckpoint) -> None:
        super().resume(stored)
        # An epoch that is done but for its validation is told already.
        done = self.iteration == self.data.train_batches.iterations
        if self.ranks.is_main:
            self.history.resume(self.epoch + done)

    def state(self) -> dict[str, Any]:
        task = self.task
        return {
            "arch": self.config["arch"]["type"],
            "state_dict": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "rng": self.ranks.gather(files.rng_state(self.ranks.device)),
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
            files.set_rng_state(states[self.ranks.rank], self.ranks.device)
        else:
            log.warning(
                "the checkpoint was written by %d processes, this run has %d: dropout goes on with "
                "new random numbers",
                len(states),
                self.ranks.world,
            )
