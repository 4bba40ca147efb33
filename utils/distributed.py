"""Processes and devices: who am I, on which device, and how do we meet.

`launch` starts the worker function once per process: in this process, in spawned ones
(`--multiprocessing_distributed`), or in the place that torchrun has prepared. The rest of the
project sees a `Ranks` and runs the same lines on every rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import interrupt, rendezvous
from utils.errors import UserError, escape_console, foreseen, last_words, listing
from utils.interrupt import Interrupted
from utils.logger import log

# Of every collective call: rank 0 may scan masks or fetch weights on a slow disk meanwhile.
TIMEOUT = timedelta(hours=1)
PATIENCE = 10  # seconds that the other ranks have to end in good order when one has failed


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Attributes:
        rank: 0 … world - 1, over all nodes.
        world: number of processes, over all nodes.
        device: where this process computes.
        hosts: process group of the hosts, where `device` has another backend than gloo. What they
            tell each other does not wait for their GPUs, and a rank that has died is noticed at
            once.
    """

    rank: int
    world: int
    device: torch.device
    hosts: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the log."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self.hosts)

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
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.hosts)
        return bool(told)

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` on all ranks when one of them was asked to stop."""
        if self.any(interrupt.asked() is not None):
            raise Interrupted(f"stopped by {interrupt.asked() or 'a signal to another process'}.")

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.hosts)
        return values


SINGLE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Launch:
    """How the processes of a run are started.

    Attributes:
        devices: one per process of this node.
        nodes, node: number of nodes and this node's number.
        backend: of the process group.
        url: where the processes meet.
        by_torchrun: rank and world come from the environment.
        distributed: several processes, or one that shall behave as such.
        world: number of processes, over all nodes.
    """

    devices: tuple[torch.device, ...]
    nodes: int
    node: int
    backend: str
    url: str
    by_torchrun: bool
    distributed: bool
    world: int


def plan_launch(config: Any, environment: Mapping[str, str] = os.environ) -> Launch:
    """Decide from config, `-d` and the environment which processes run where.

    Raises:
        UserError: a GPU id that does not exist, a malformed `-d` or `dist_url`, a wrong node.
    """
    by_torchrun = "RANK" in environment and "WORLD_SIZE" in environment
    distributed = by_torchrun or config["multiprocessing_distributed"]
    devices = find_devices(config.device, training=not config.test)
    cuda = devices[0].type == "cuda"
    if by_torchrun:
        local = int(environment.get("LOCAL_RANK", 0))
        here = int(environment.get("LOCAL_WORLD_SIZE", 1))
        if cuda and here > len(devices):
            raise UserError(
                f"torchrun starts {here} processes on this node, but it has {len(devices)} usable "
                "GPU(s); lower --nproc_per_node."
            )
        devices = [devices[local] if cuda else devices[0]]
    elif not distributed:
        if len(devices) > 1 and config.device is not None:
            log.warning(
                "-d %s: only %s is used; all of them need --multiprocessing_distributed",
                config.device,
                devices[0],
            )
        devices = devices[:1]
    elif not cuda:
        devices = devices * config["n_gpu"]
    nodes, node = config["world_size"], config["rank"]
    if not by_torchrun and not node < nodes:
        raise UserError(f"rank is {node}, but world_size is {nodes}: nodes are 0..{nodes - 1}.")
    backend = config["dist_backend"] if cuda else "gloo"
    url = "env://" if by_torchrun else config["dist_url"]
    if distributed and not by_torchrun:
        url = rendezvous.resolve(url, nodes, environment)
    world = int(environment["WORLD_SIZE"]) if by_torchrun else nodes * len(devices)
    world = world if distributed else 1
    return Launch(tuple(devices), nodes, node, backend, url, by_torchrun, distributed, world)


def find_devices(text: str | None, *, training: bool = False) -> list[torch.device]:
    """The devices that `-d` names; default: every visible GPU, or the CPU.

    Args:
        text: of `-d`.
        training: a GPU that is asked for must be there. To evaluate, `-d 0`, which published
            commands end with, means the CPU where there is no GPU.

    Raises:
        UserError: a malformed text, or a GPU that does not exist.
    """
    if text is not None and text != "cpu" and not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"-d/--device is '{text}'; give GPU ids such as 0 or 0,1, or cpu.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ids = [] if text in (None, "cpu") else [int(number) for number in text.split(",")]
    if len(set(ids)) < len(ids):
        raise UserError(f"-d/--device is '{text}', but a GPU is named twice.")
    if count == 0 and (not ids or (ids == [0] and not training)):
        return [torch.device("cpu")]
    if text == "cpu":
        return [torch.device("cpu")]
    wrong = [number for number in ids if number >= count]
    if wrong:
        seen = listing(range(count)) or f"none ({no_gpu()}), so use -d cpu"
        raise UserError(
            f"-d/--device is '{text}', but GPU {wrong[0]} does not exist; visible: {seen}."
        )
    return [torch.device("cuda", number) for number in ids or range(count)]


def no_gpu() -> str:
    """Why torch computes on no GPU here."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was installed without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES is '{hidden}')" if hidden is not None else ""
    return f"torch {torch.__version__} sees no GPU or no driver{why}"


def launch(worker: Callable[[Any, Ranks], None], job: Any, plan: Launch) -> None:
    """Run `worker(job, ranks)` in every process of the run and wait for the end.

    When one process fails, the others are stopped and its error is the one that is raised. Signals
    that ask to stop are passed on to all of them.

    Raises:
        UserError: as the failing process raised it.
        Interrupted: a signal stopped the processes.
        RuntimeError: any other failure of a process, with its traceback.
    """
    if not plan.distributed:
        _select(plan.devices[0])
        with interrupt.watch():
            worker(job, Ranks(0, 1, plan.devices[0]))
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if plan.by_torchrun else len(plan.devices)
    if plan.world > here:  # there are other nodes
        rendezvous.name_interface(plan.url)
    if plan.by_torchrun:
        with interrupt.watch():
            rank = int(os.environ["RANK"])
            _as_rank(worker, job, plan, rank, 0, lambda e: print(last_words(e)[0], file=sys.stderr))
        return
    interrupt.start_resource_tracker()
    reports = mp.get_context("spawn").SimpleQueue()
    processes: list[Any] = []

    def pass_on(number: int, frame: Any) -> None:
        if not processes:
            raise Interrupted(f"stopped by {signal.Signals(number).name}.")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, number)

    with interrupt.watch(pass_on), rendezvous.held(plan.url, plan.nodes, plan.node) as url:
        arguments = (worker, job, replace(plan, url=url), reports)
        with interrupt.shield():
            processes += mp.start_processes(
                _spawned, arguments, nprocs=len(plan.devices), join=False, start_method="spawn"
            ).processes
        exit_codes = _join(processes)
        if any(exit_codes):
            _raise_cause(plan, exit_codes, reports)


def _join(processes: list[Any]) -> list[int | None]:
    """Wait until all processes have ended, or one has failed: then the others are stopped.

    Returns:
        Exit codes; None for those that were stopped.
    """
    running = processes
    while running and not any(process.exitcode for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    exit_codes = [process.exitcode for process in processes]
    for process in running:
        process.terminate()
    limit = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(0.0, limit - time.monotonic()))
        if process.is_alive():  # it waits for its GPU, and Python handles no signal meanwhile
            process.kill()
            process.join()
    return exit_codes


def _raise_cause(plan: Launch, exit_codes: list[int | None], reports: Any) -> NoReturn:
    """Raise the first failure among the processes; ranks that lost their peer fail after it."""
    for local, code in enumerate(exit_codes):
        if code is not None and code < 0:
            rank = plan.node * len(plan.devices) + local
            raise RuntimeError(
                f"rank {rank} was killed by {signal.Signals(-code).name}; all ranks are stopped."
            )
    told = []
    while not reports.empty():
        told.append(reports.get())
    if not told:
        raise RuntimeError(f"a process died without a word; exit codes: {exit_codes}.")
    _, rank, error = min(told)
    if isinstance(error, str):
        raise RuntimeError(f"rank {rank} failed; all ranks are stopped.\n{error}")
    raise error


def _spawned(local: int, worker: Callable, job: Any, plan: Launch, reports: Any) -> None:
    rank = plan.node * len(plan.devices) + local
    escape_console()
    if sys.platform == "linux":
        # What is spawned spawns by default, and every loading process would import torch.
        mp.set_start_method("fork", force=True)

    def tell(error: BaseException) -> None:
        foreseen = isinstance(error, (UserError, Interrupted))
        reports.put((time.time(), rank, error if foreseen else last_words(error)[0]))

    interrupt.install()
    _as_rank(worker, job, plan, rank, local, tell)
    interrupt.ignore()


def _as_rank(
    worker: Callable,
    job: Any,
    plan: Launch,
    rank: int,
    local: int,
    tell: Callable[[BaseException], None],
) -> None:
    """Be one rank of several.

    An exception is told and ends this process at once. An orderly way out would leave the group,
    and with NCCL that waits for the other ranks, which wait for this one.
    """
    try:
        interrupt.unshield()
        _in_group(worker, job, plan, rank, local)
    except BaseException as raised:
        interrupt.defer()
        error = foreseen(interrupt.cause_of(raised), f"rank {rank}: ")
        tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # they would keep a launcher waiting
            child.kill()
        os._exit(last_words(error)[1])


def _in_group(worker: Callable, job: Any, plan: Launch, rank: int, local: int) -> None:
    device = plan.devices[local]
    _select(device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Each process would otherwise claim every core.
        torch.set_num_threads(max(1, torch.get_num_threads() // len(plan.devices)))
    dist.init_process_group(
        plan.backend,
        **rendezvous.place(plan.url, plan.nodes, TIMEOUT),
        rank=rank,
        world_size=plan.world,
        timeout=TIMEOUT,
        device_id=device if plan.backend == "nccl" else None,
    )
    hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if plan.backend != "gloo" else None
    worker(job, Ranks(rank, plan.world, device, hosts))
    dist.destroy_process_group()  # not after an exception, see `_as_rank`


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
