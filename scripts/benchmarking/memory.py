"""How much memory a call needs at its peak: in a fresh process on a CPU, by its count on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from scripts.benchmarking.measure import forget_peak, resident
from scripts.benchmarking.plan import Plan

# glibc gives back at once what is freed, so that no call can live on the remains of another.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def extra_memory(
    plan: Plan, ways: Sequence[str], make: Callable[..., Callable[[], object]], *args: Any
) -> dict[str, float]:
    """MiB that a call needs at its peak beyond what lay there before, each way.

    Args:
        plan: names the device; on a CPU each way is called in a fresh process.
        ways: "plain", "ours", ….
        make: from one of them, the image side, more of `args` and the device to the call.
        args: image side first.
    """
    jobs = [(make, way, *args, plan.device) for way in ways]
    if plan.device.type == "cuda":
        return {way: peak(*job) for way, job in zip(ways, jobs, strict=True)}
    with freed_at_once(), get_context("spawn").Pool(len(jobs), maxtasksperchild=1) as pool:
        return dict(zip(ways, pool.starmap(peak, jobs, chunksize=1), strict=True))


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let processes started now give memory back as soon as it is freed, which makes them slow."""
    os.environ.update(GIVE_BACK)
    try:
        yield
    finally:
        for name in GIVE_BACK:
            del os.environ[name]


def peak(make: Callable[..., Callable[[], object]], way: str, side: int, *args: Any) -> float:
    """MiB of one way; on a CPU right only once per process."""
    make(way, 64, *args)()  # libraries, threads and handles are no part of the peak
    return peak_increase(make(way, side, *args), args[-1])


def peak_increase(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call needs at its peak beyond what lies there now."""
    call()  # leaves gradients and momentum; on CUDA it also chooses algorithms, some with much room
    gc.collect()
    if device.type == "cpu":
        forget_peak()
        before = resident("VmRSS")
        call()
        return max(0.0, resident("VmHWM") - before)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20
