"""What training a step costs: seconds of an epoch, and the memory that it needs at its peak."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from utils.misc import write_json

FILE = "cost.json"  # beside the step's metrics.json


class Cost:
    """Counted by one process from its start on; `cost.json` tells of a step that it trained."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []  # of whole epochs
        forget_peak(device)

    def write(self, folder: Path) -> None:
        """Write `cost.json`; nothing where this process trained no whole epoch."""
        if self.seconds:
            epoch = sum(self.seconds) / len(self.seconds)
            told = {"seconds_per_epoch": epoch, "peak_memory_mib": peak(self.device)}
            write_json(folder / FILE, {"device": str(self.device), **told})


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is the process' own
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float | None:
    """MiB at the peak: of tensors on CUDA, of the process on a CPU; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM")


def resident(name: str) -> float | None:
    """MiB of this process: "VmRSS" now, "VmHWM" at its peak; None elsewhere than on Linux."""
    if not os.path.exists("/proc/self/status"):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    values = (int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
    return next(values, None)
