"""What training a step brought and cost, by epoch: `history.json` beside its `metrics.json`."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.config_file import read_json
from utils.config_schema import NULL, NUMBER, Key
from utils.errors import UserError, sentence
from utils.files import write_json
from utils.forms import FLAG, TEXT, Maybe, fault
from utils.logger import log

FILE = "history.json"
EPOCH = {
    "epoch": Key("", (int,), 1),
    "seconds": Maybe(Key("", NUMBER, 0, most=1e9)),
    "whole": Maybe(FLAG),
    "lr": Maybe(Key("", NUMBER, 0)),
    "images_per_s": Maybe(Key("", NUMBER, 0)),
    "losses": Maybe({...: Key("", NUMBER, -1e38, most=1e38)}),
}
FORM = {
    "device": TEXT,
    "global_batch": Maybe(Key("", (int,), 1)),  # older files have none
    "peak_memory_mib": Key("", (*NUMBER, NULL), 0, most=1e12),
    "epochs": [EPOCH],
}


def read_history(file: Path) -> dict[str, Any]:
    """The content of a `history.json`.

    Raises:
        UserError: it cannot be read, is not of its form, or its epochs are not in order.
    """
    content = read_json(file, "file")
    if text := fault(content, FORM):
        raise UserError(f"{file}: {text}.")
    epochs = [each["epoch"] for each in content["epochs"]]
    for before, after in itertools.pairwise(epochs):
        if after <= before:
            raise UserError(f"{file}: epoch {after} comes after epoch {before}.")
    return content


class History:
    """The epochs of a step, written anew after each.

    An epoch holds the means of the loss terms, the learning rate at its end, images per second,
    seconds, and whether the process trained it whole.
    """

    def __init__(self, folder: Path, device: torch.device):
        """
        Args:
            folder: of the log.
            device: whose peak of memory is told; it begins anew.
        """
        self.file, self.device = folder / FILE, device
        self.epochs: list[dict[str, Any]] = []
        self.peak_before = 0.0  # of the processes that trained the epochs before
        forget_peak(device)

    def resume(self, epoch: int) -> None:
        """Take over the epochs up to `epoch` that earlier processes wrote.

        No weight depends on them, so a damaged file does not stop a run: it is put aside, and the
        history begins anew.
        """
        if not self.file.is_file():
            return
        try:
            written = read_history(self.file)
        except UserError as error:
            aside = self.file.with_name(f"{self.file.name}.damaged")
            self.file.replace(aside)
            log.warning(
                "%s It is kept as %s, and the losses of epochs 1 to %d are lost to %s; training "
                "goes on",
                *(sentence(error), aside.name, epoch, FILE),
            )
            return
        self.epochs = [each for each in written["epochs"] if each["epoch"] <= epoch]
        self.peak_before = written["peak_memory_mib"] or 0.0

    def add(self, global_batch: int, losses: Mapping[str, float], **figures: Any) -> None:
        """Write a further epoch.

        Args:
            global_batch: images of an iteration, over all processes.
            losses: by term; those that are not finite are left out, for JSON has no such numbers.
            figures: the rest of it.
        """
        finite = {name: value for name, value in losses.items() if math.isfinite(value)}
        self.epochs.append({**figures, "losses": finite})
        now = peak(self.device)
        most = None if now is None else max(now, self.peak_before)
        about = {
            "device": device_name(self.device),
            "global_batch": global_batch,
            "peak_memory_mib": most,
        }
        write_json(self.file, {**about, "epochs": self.epochs})


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is the process' own
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak(device: torch.device) -> float | None:
    """MiB at the peak: of tensors on CUDA, of the process on a CPU; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM")


def resident(name: str) -> float | None:
    """MiB of this process: "VmRSS" now, "VmHWM" at its peak; None elsewhere than on Linux."""
    if not os.path.exists("/proc/self/status"):
        return None
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = (int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
    return next(values, None)
