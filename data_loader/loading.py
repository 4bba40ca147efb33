"""The loader of batches: its processes outlive signals, and when one fails, a sentence says why."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from utils.errors import UserError
from utils.logger import log
from utils.machine import keep_freed_memory
from utils.processes import children

WORKERS = "data_loader.args.num_workers"
# What an error of torch, of the system or of a loading process says → what is wrong, what to do.
FAULTS = {
    r"unable to (mmap|write|allocate shared)|Bus error|shared memory|No space left": (
        "the loading processes find no room in /dev/shm; give the container more "
        f"(docker run --shm-size 8g), lower the batch size, or set {WORKERS} to 0"
    ),
    r"Too many open files|received \d+ items of ancdata": (
        "the loading processes may open no further file; raise the limit (ulimit -n 65536), or "
        f"set {WORKERS} lower"
    ),
    r"Cannot allocate memory|can't allocate memory|MemoryError|std::bad_alloc": (
        f"the loading processes get no more memory; set {WORKERS} or the batch size lower, or "
        "raise the limit (ulimit -v)"
    ),
    r"can't start new thread|Resource temporarily unavailable": (
        "no further process or thread may be started; raise the limit (ulimit -u), or set "
        f"{WORKERS} lower"
    ),
    r"killed by signal|exited unexpectedly": (
        f"a loading process died, most likely killed because the memory is full; set {WORKERS} or "
        "the batch size lower"
    ),
}


class Loader(DataLoader):
    """A loader whose processes no signal meets before they can take it, and that waits for them for
    a limited time: one that was forked while another thread held a lock may wait for ever.
    """

    limit = 1800  # seconds for a batch; half of what ranks wait for each other
    patience = 60  # seconds without a batch after which the log says so, and again
    look_every = 5  # seconds between two looks whether one is waited for

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gave_up = False  # whether the limit has passed

    def __iter__(self) -> Any:
        keep_freed_memory()
        try:
            with children.block_signals():
                batches = super().__iter__()
            with self._watched() as waiting:
                yield from self._batches(batches, waiting)
        except (RuntimeError, OSError, MemoryError) as error:
            raise self._explained(error) from None

    @staticmethod
    def _batches(batches: Iterator[Any], waiting: list[float]) -> Iterator[Any]:
        while True:
            waiting.append(time.monotonic())
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                waiting.clear()
            yield batch

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[float]]:
        """A list for the moment since which a batch is waited for: the log tells of long ones."""
        waiting: list[float] = []
        if not self.num_workers:
            yield waiting
            return
        ended = threading.Event()

        def watch() -> None:
            logged = 0.0
            while not ended.wait(min(self.look_every, self.patience, self.limit)):
                since, now = next(iter(waiting), None), time.monotonic()
                if since is None:
                    continue
                if now - since >= self.limit:
                    self.gave_up = True
                    # One that hangs hears no SIGTERM. Whoever waits is told of their death, which a
                    # time limit of torch's own would keep from it until it has passed.
                    for worker in multiprocessing.active_children():
                        worker.kill()
                    return
                if now - max(since, logged) >= self.patience:
                    logged = now
                    log.warning(
                        "no batch has come for %.0f seconds: the storage of the data is slow, or "
                        "one of %d loading process(es) hangs; after %d seconds the run ends",
                        *(now - since, self.num_workers, self.limit),
                    )

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield waiting
        finally:
            ended.set()
            thread.join()

    def _explained(self, error: Exception) -> Exception:
        """A `UserError` in place of an error whose cause is known."""
        if not self.num_workers:
            return error
        text = f"{type(error).__name__}: {error}"
        if self.gave_up:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise as well
            return UserError(
                f"no batch has come from {self.num_workers} loading process(es) for {self.limit} "
                "seconds: one hangs, or the storage of the data does; continue with -r auto or, "
                f"when it happens again, set {WORKERS} to 0."
            )
        for pattern, advice in FAULTS.items():
            if re.search(pattern, text):
                return UserError(f"{advice}; continue with -r auto.")
        return error
