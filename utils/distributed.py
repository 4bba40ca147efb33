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
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import interrupt
from utils.logger import log
from utils.misc import Interrupted, UserError, last_words, listing, sentence

# Of every collective call: rank 0 may scan masks or fetch weights on a slow disk meanwhile.
TIMEOUT = timedelta(hours=1)
STALE = 600  # seconds after which a file to meet at is no other node's of the same run
SIOCGIFADDR = 0x8915  # of Linux' ioctl: the IPv4 address of a network interface
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


def plan_launch(config: Any, environment: dict[str, str] | None = None) -> Launch:
    """Decide from config, `-d` and the environment which processes run where.

    Raises:
        UserError: a GPU id that does not exist, a malformed `-d` or `dist_url`, a wrong node.
    """
    environment = dict(os.environ) if environment is None else environment
    by_torchrun = "RANK" in environment and "WORLD_SIZE" in environment
    distributed = by_torchrun or config["multiprocessing_distributed"]
    devices = _devices(config.device)
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
        url = _meeting_place(url, nodes, environment)
    world = int(environment["WORLD_SIZE"]) if by_torchrun else nodes * len(devices)
    world = world if distributed else 1
    return Launch(tuple(devices), nodes, node, backend, url, by_torchrun, distributed, world)


def _devices(text: str | None) -> list[torch.device]:
    """The devices that `-d` names; default: every visible GPU, or the CPU."""
    if text is not None and text != "cpu" and not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"-d/--device is '{text}'; give GPU ids such as 0 or 0,1, or cpu.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ids = [] if text in (None, "cpu") else [int(number) for number in text.split(",")]
    if len(set(ids)) < len(ids):
        raise UserError(f"-d/--device is '{text}', but a GPU is named twice.")
    # Published commands end with -d 0: on a machine without any GPU that means the CPU.
    if text == "cpu" or (count == 0 and ids in ([], [0])):
        return [torch.device("cpu")]
    wrong = [number for number in ids if number >= count]
    if wrong:
        raise UserError(
            f"-d/--device is '{text}', but GPU {wrong[0]} does not exist; visible: "
            f"{listing(range(count)) or 'none, so use -d cpu'}."
        )
    return [torch.device("cuda", number) for number in ids or range(count)]


def _meeting_place(url: str, nodes: int, environment: dict[str, str]) -> str:
    """`dist_url` as tcp:// or file://; another port or file when that of a single node is taken."""
    if url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UserError(
                f"dist_url is 'env://', but the environment has no {listing(missing)}; set "
                "MASTER_ADDR to the name of node 0 and MASTER_PORT to a free port of it."
            )
        url = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return (_free_file if url.startswith("file:") else _free_url)(url, nodes)


def _free_file(url: str, nodes: int) -> str:
    """`url`; another file when that of a single-node run is there, as a killed run leaves it."""
    if not re.fullmatch(r"file:///[^?#]*[^/?#]", url):  # torch would read the rest as no path
        raise UserError(
            f"dist_url is '{url}'; file:// needs an absolute path to a file, without ? and #, such "
            "as file:///shared/meet."
        )
    path = Path(url.removeprefix("file://"))
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"dist_url is '{url}', but no file can be written there; name one in an existing "
            "folder that this user may write to."
        )
    if not path.exists():
        return url
    if nodes == 1:
        log.warning("dist_url: %s exists, %s.%d is taken instead", path, path, os.getpid())
        return f"{url}.{os.getpid()}"
    if time.time() - path.stat().st_mtime > STALE:  # a younger one may be another node's
        raise UserError(
            f"dist_url is '{url}', but this file is of an earlier run, which was killed; delete it."
        )
    return url


def _free_url(url: str, nodes: int) -> str:
    """`url`, with a free port when the port of a single-node run is taken."""
    parts = re.fullmatch(r"tcp://([^:/]+):(\d+)", url)
    if parts is None or not 0 < int(parts[2]) < 65536:
        raise UserError(
            f"dist_url is '{url}'; it must be tcp://HOST:PORT, env:// (which takes them from "
            "MASTER_ADDR and MASTER_PORT) or file:///PATH."
        )
    host, port = parts[1], int(parts[2])
    if nodes > 1:
        return url
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
            return url
        except OSError:
            pass
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise UserError(
                f"dist_url is '{url}', but this node cannot listen there: {error}."
            ) from None
        free = probe.getsockname()[1]
    log.warning("dist_url: port %d is busy, port %d is taken instead", port, free)
    return f"tcp://{host}:{free}"


def _name_interface(plan: Launch) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would have other nodes call this one in vain.

    gloo tells them the address that the host's name resolves to, on Debian 127.0.1.1. On a single
    node that works, and whatever the user has set stays.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if plan.by_torchrun else len(plan.devices)
    if plan.world == local or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    addresses = _addresses()
    name = _matching(os.environ.get("NCCL_SOCKET_IFNAME", ""), addresses)
    if name is None:
        try:
            own = socket.gethostbyname(socket.gethostname())
        except OSError:  # gloo then takes a loopback address
            own = "127.0.0.1"
        if not own.startswith("127."):
            return
        host = re.match(r"tcp://([^:]+)", plan.url)
        name = _towards(host[1] if host else os.environ.get("MASTER_ADDR"), addresses)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        return
    log.warning(
        "this node's name, %s, means %s, where other nodes cannot reach it: set GLOO_SOCKET_IFNAME "
        "to the network interface between the nodes; there are %s",
        socket.gethostname(),
        own,
        listing(addresses) or "none with an IPv4 address",
    )


def _addresses() -> dict[str, str]:
    """Network interfaces with their IPv4 addresses, loopback last; empty where it is not Linux."""
    found: dict[str, str] = {}
    if sys.platform != "linux":
        return found
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return dict(sorted(found.items(), key=lambda item: item[1].startswith("127.")))


def _matching(wanted: str, addresses: dict[str, str]) -> str | None:
    """The first interface that a NCCL_SOCKET_IFNAME means.

    Args:
        wanted: prefixes such as `eth,ib`; after `=` whole names; after `^` those it must not be.
        addresses: as `_addresses` returns them.
    """
    text = wanted.removeprefix("^")
    words = [word for word in text.removeprefix("=").split(",") if word]
    if not words:
        return None
    for name in addresses:
        named = name in words if text.startswith("=") else name.startswith(tuple(words))
        if named != wanted.startswith("^"):
            return name
    return None


def _towards(host: str | None, addresses: dict[str, str]) -> str | None:
    """The interface by which `host` is reached, or the only one that leads out of this machine."""
    outside = {address: name for name, address in addresses.items() if address[:4] != "127."}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if host is not None:
            probe.connect((host, 9))  # sends nothing, but chooses the way
            if (own := probe.getsockname()[0]) in outside:
                return outside[own]
    return next(iter(outside.values())) if len(outside) == 1 else None


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
    _name_interface(plan)
    if plan.by_torchrun:

        def say(error: BaseException) -> None:
            sys.stderr.write(last_words(error)[0] + "\n")

        with interrupt.watch():
            _as_rank(worker, job, plan, int(os.environ["RANK"]), 0, say)
        return
    interrupt.start_resource_tracker()
    reports = mp.get_context("spawn").SimpleQueue()
    arguments = (worker, job, plan, reports)
    processes: list[Any] = []

    def pass_on(number: int, frame: Any) -> None:
        if not processes:
            raise Interrupted(f"stopped by {signal.Signals(number).name}.")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, number)

    with interrupt.watch(pass_on):
        with interrupt.shield():
            processes += mp.start_processes(
                _spawned, arguments, nprocs=len(plan.devices), join=False, start_method="spawn"
            ).processes
        exit_codes = _join(processes)
        if plan.node == 0 and plan.url.startswith("file://"):  # ranks that failed left it
            Path(plan.url.removeprefix("file://")).unlink(missing_ok=True)
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
    _, rank, kind, text = min(told)
    if kind in (UserError.__name__, Interrupted.__name__):
        raise (UserError if kind == UserError.__name__ else Interrupted)(text)
    raise RuntimeError(f"rank {rank} failed; all ranks are stopped.\n{text}")


def _spawned(local: int, worker: Callable, job: Any, plan: Launch, reports: Any) -> None:
    rank = plan.node * len(plan.devices) + local
    if sys.platform == "linux":
        # What is spawned spawns by default, and every loading process would import torch.
        mp.set_start_method("fork", force=True)

    def tell(error: BaseException) -> None:
        kind, text = type(error).__name__, last_words(error)[0]
        if isinstance(error, UserError):
            kind, text = UserError.__name__, sentence(error)
        elif isinstance(error, Interrupted):
            text = str(error)
        reports.put((time.time(), rank, kind, text))

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
        error = interrupt.cause_of(raised)
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
    options: dict[str, Any] = {"device_id": device} if plan.backend == "nccl" else {}
    dist.init_process_group(
        plan.backend,
        init_method=plan.url,
        rank=rank,
        world_size=plan.world,
        timeout=TIMEOUT,
        **options,
    )
    hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if plan.backend != "gloo" else None
    worker(job, Ranks(rank, plan.world, device, hosts))
    dist.destroy_process_group()  # not after an exception, see `_as_rank`


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
