"""What a step says while it is trained: progress bar, losses, rates, TensorBoard, history, log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from data_loader.data_loaders import IncrementalDataLoader
from data_loader.dataset import Sample
from trainer.loss_meter import READ_EVERY, LossMeter, Update
from trainer.tensorboard import TensorBoard
from utils.history import History
from utils.logger import log, progress
from utils.parse_config import ConfigParser
from utils.ranks import Ranks


def batch_groups(loader: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """The batches of a loader, `size` at a time."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


class StepLog:
    """The bookkeeping of a step, so that the loop shows the loop.

    Attributes:
        losses: of the epoch.
        board: TensorBoard's events.
        history: of the epochs, `history.json`.
    """

    def __init__(self, config: ConfigParser, ranks: Ranks, data: IncrementalDataLoader):
        self.ranks, self.data = ranks, data
        self.epochs = config["trainer"]["epochs"]
        self.losses = LossMeter(READ_EVERY if ranks.device.type == "cuda" else 1)
        self.board = TensorBoard(config, ranks)
        self.history = History(config.log_dir(), ranks.device)

    def close(self) -> None:
        """Flush TensorBoard's events."""
        self.board.close()

    @contextmanager
    def epoch(self, epoch: int, done: int, advice: str) -> Iterator[StepLog]:
        """The bar of an epoch while it runs; its figures when it has ended well.

        Args:
            epoch: from 1.
            done: its iterations that an earlier process has trained.
            advice: how to go on where the run ends by a loss that is not finite.
        """
        step, count = self.data.task.schedule_step, self.data.train_batches.iterations
        self.losses.begin(f"step {step}, epoch {epoch}", advice)
        self.before = (epoch - 1) * count  # iterations of the epochs before
        self.start, self.images, self.lr = time.perf_counter(), 0, 0.0
        with progress(
            total=count,
            initial=done,
            desc=f"step {step} epoch {epoch}/{self.epochs}",
            disable=not self.ranks.is_main,
            unit="it",
        ) as self.bar:
            yield self
        if self.images:  # else the run was stopped after the last iteration of the epoch
            self._end(epoch, whole=done == 0)

    def add(self, iteration: int, update: Update, batches: Sequence[Sample], lr: float) -> bool:
        """Take the update of an iteration; True when its losses were read.

        Args:
            iteration: of the epoch, from 1.
            update: of `Trainer.train_step`.
            batches: what it was made of.
            lr: the learning rate that it was made with.
        """
        names = [name for batch in batches for name in batch.name]
        self.images += len(names) * self.ranks.world
        self.lr = lr
        read = self.losses.add(iteration, update, names)
        if read:
            rate = self.images / (time.perf_counter() - self.start)
            shown = {"lr": f"{lr:.2e}", "images_per_s": f"{rate:.1f}"}
            if self.losses.count:
                shown = {"loss": f"{self.losses.means()['loss']:.3f}"} | shown
            self.bar.set_postfix(shown, refresh=False)
            latest = self.losses.latest() | {"lr": lr}
            self.board.scalars(latest, "train", self.before + iteration)
        self.bar.update()
        return read

    def _end(self, epoch: int, *, whole: bool) -> None:
        seconds = time.perf_counter() - self.start
        rate, skipped = self.images / seconds, self.losses.skipped
        means = self.losses.means(self.ranks) if self.losses.count else {}
        if self.ranks.is_main:
            self.history.add(
                self.data.global_batch,
                means,
                epoch=epoch,
                lr=self.lr,
                images_per_s=rate,
                seconds=seconds,
                whole=whole,
            )
        log.info(
            "epoch %d/%d: %slr %.3e, %s%.1f images/s, %.0f s",
            epoch,
            self.epochs,
            "".join(f"{name} {value:.4f}, " for name, value in means.items()),
            self.lr,
            f"{skipped} updates skipped, " if skipped else "",
            rate,
            seconds,
        )
