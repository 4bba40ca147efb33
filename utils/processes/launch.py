"""The processes of a run: planned, started, ended together.

Runs a function once per process: in this one, in spawned ones (`--multiprocessing_distributed`), or
in the place that torchrun has prepared. Does not know what the function does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.errors import UserError, escape_console, foreseen, last_words
from utils.logger import log
from utils.processes import meet, signals
from utils.processes.children import block_signals, unblock_signals
from utils.processes.devices import find_devices
from utils.processes.signals import Interrupted
from utils.ranks import Ranks

# Of every collective call: rank 0 may scan masks or fetch weights on a slow disk meanwhile.
TIMEOUT = timedelta(hours=1)
PATIENCE = 10  # seconds that the other ranks have to end in good order when one has failed

Worker = Callable[[Any, Ranks], None]


@dataclass(frozen=True)
class Launch:
    """How the processes of a run are started.

    Attributes:
        devices: one per process of this node.
        backend: of the process group.
        url: where the processes meet.
        nodes, node: number of nodes and this node's number; what torchrun has started counts as a
            node of its own.
        by_torchrun: this process is a rank that torchrun has started.
        distributed: several processes, or one that shall behave as such.
    """

    devices: tuple[torch.device, ...]
    backend: str
    url: str
    nodes: int = 1
    node: int = 0
    by_torchrun: bool = False
    distributed: bool = True

    @property
    def world(self) -> int:
        """Number of processes, over all nodes."""
        return self.nodes * len(self.devices)

    def rank(self, local: int) -> int:
        """Rank of one of this node's processes."""
        return self.node * len(self.devices) + local


def plan_launch(config: Any, environment: Mapping[str, str] = os.environ) -> Launch:
    """Decide from config, `-d` and the environment which processes run where.

    Raises:
        UserError: a GPU id that does not exist, a malformed `-d` or `dist_url`, a wrong node.
    """
    devices = find_devices(config.call.device, training=not config.call.test)
    cuda = devices[0].type == "cuda"
    backend = config["dist_backend"] if cuda else "gloo"
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
        device = _device_by_torchrun(devices, environment)
        return Launch((device,), backend, "env://", world, rank, by_torchrun=True)
    nodes, node = config["world_size"], config["rank"]
    if not node < nodes:
        raise UserError(f"rank is {node}, but world_size is {nodes}: nodes are 0..{nodes - 1}.")
    if config["multiprocessing_distributed"]:
        devices = devices if cuda else devices * config["n_gpu"]
        return Launch(
            tuple(devices), backend, meet.resolve(config["dist_url"], environment), nodes, node
        )
    if len(devices) > 1 and config.call.device is not None:
        log.warning(
            "-d %s: only %s is used; all of them need --multiprocessing_distributed",
            *(config.call.device, devices[0]),
        )
    return Launch((devices[0],), backend, config["dist_url"], distributed=False)


def _device_by_torchrun(
    devices: list[torch.device], environment: Mapping[str, str]
) -> torch.device:
    if devices[0].type == "cpu":
        return devices[0]
    here = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if here > len(devices):
        raise UserError(
            f"torchrun starts {here} processes on this node, but it has {len(devices)} usable "
            "GPU(s); lower --nproc_per_node."
        )
    return devices[int(environment.get("LOCAL_RANK", 0))]


def launch(worker: Worker, job: Any, plan: Launch) -> None:
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
        with signals.watch():
            worker(job, Ranks(0, 1, plan.devices[0]))
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if plan.by_torchrun else len(plan.devices)
    if plan.world > here:  # there are other nodes
        meet.warn_of_loopback()
    if plan.by_torchrun:
        _as_rank(0, worker, job, plan)
    else:
        _spawn(worker, job, plan)


# --------------------------------------------------------------------------------- the launcher
def _spawn(worker: Worker, job: Any, plan: Launch) -> None:
    """Start the ranks of this node and wait for them."""
    with block_signals():  # in multiprocessing's helper process, which a group's signal would end
        resource_tracker.ensure_running()
    reports = mp.get_context("spawn").SimpleQueue()
    processes: list[Any] = []

    def pass_on(number: int, frame: Any) -> None:
        if not processes:
            raise Interrupted(f"stopped by {signal.Signals(number).name}.")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, number)

    place = meet.hold(plan.url) if plan.nodes == 1 else contextlib.nullcontext(plan.url)
    with signals.watch(pass_on), place as url:
        arguments = (worker, job, replace(plan, url=url), reports)
        with block_signals():
            processes += mp.start_processes(
                _as_rank, arguments, nprocs=len(plan.devices), join=False, start_method="spawn"
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
            name = signal.Signals(-code).name
            raise RuntimeError(
                f"rank {plan.rank(local)} was killed by {name}; all ranks are stopped."
            )
    failures = []
    while not reports.empty():
        failures.append(reports.get())
    if not failures:
        raise RuntimeError(f"a process died without a word; exit codes: {exit_codes}.")
    _, rank, error = min(failures)
    if isinstance(error, str):
        raise RuntimeError(f"rank {rank} failed; all ranks are stopped.\n{error}")
    raise error


# --------------------------------------------------------------------------------- one rank
def _as_rank(local: int, worker: Worker, job: Any, plan: Launch, reports: Any = None) -> None:
    """Be one rank of several.

    An exception is reported and ends this process at once. An orderly way out would leave the
    group, and with NCCL that waits for the other ranks, which wait for this one.

    Args:
        local: place among the processes of this node.
        reports: queue for the launcher, which has started this process; without one it is
            torchrun's, and errors are printed.
    """
    if reports is not None:
        signals.end_at_once()
        escape_console()
    try:
        with signals.watch():
            unblock_signals()
            _in_group(local, worker, job, plan)
    except BaseException as raised:
        rank = plan.rank(local)
        error = foreseen(raised, f"rank {rank}: ")
        text, code = last_words(error)
        if reports is None:
            print(text, file=sys.stderr)
        else:
            known = isinstance(error, (UserError, Interrupted))
            reports.put((time.time(), rank, error if known else text))
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # they would keep a launcher waiting
            child.kill()
        os._exit(code)


def _in_group(local: int, worker: Worker, job: Any, plan: Launch) -> None:
    device = plan.devices[local]
    _select(device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Each process would otherwise claim every core.
        torch.set_num_threads(max(1, torch.get_num_threads() // len(plan.devices)))
    place: dict[str, Any] = {"init_method": plan.url}
    if plan.nodes == 1 and not plan.by_torchrun:  # the launcher holds the port
        place = {"store": dist.TCPStore(*meet.address(plan.url), timeout=TIMEOUT)}
    dist.init_process_group(
        plan.backend,
        **place,
        rank=plan.rank(local),
        world_size=plan.world,
        timeout=TIMEOUT,
        device_id=device if plan.backend == "nccl" else None,
    )
    cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if plan.backend != "gloo" else None
    worker(job, Ranks(plan.rank(local), plan.world, device, cpu_group))
    dist.destroy_process_group()  # not after an exception, see `_as_rank`


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
