"""This process among those of the run: its number, its device, what the ranks tell each other.

All ranks run the same lines. Does not know how they were started (`utils/processes/launch.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from utils.processes.signals import Interrupted, pending_signal


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Attributes:
        rank: 0 … world - 1, over all nodes.
        world: number of processes, over all nodes.
        device: where this process computes.
        cpu_group: gloo group for what is not to wait for GPUs and is to notice at once that a rank
            has died; None where the default group is gloo already.
    """

    rank: int
    world: int
    device: torch.device
    cpu_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the log."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self.cpu_group)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, so that they find its cache or download."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank; no GPU is waited for."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` on all ranks when a signal has reached one of them."""
        if self.any(pending_signal() is not None):
            raise Interrupted(f"stopped by {pending_signal() or 'a signal to another process'}.")

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values


SINGLE = Ranks(0, 1, torch.device("cpu"))
