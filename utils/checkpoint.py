"""Checkpoint files: written whole or not at all, read without ever running code from them."""

from __future__ import annotations

import os
import pickle
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.misc import UserError, atomic_path

LAST = "last.pth"
BEST = "model_best.pth"


def epoch_file(epoch: int) -> str:
    """Name of the checkpoint that is kept of an epoch."""
    return f"checkpoint-epoch{epoch}.pth"


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it and rename it."""
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def keep(path: Path, name: str) -> None:
    """Let the checkpoint `path` also be known as `name` in its folder, without a second copy."""
    temporary = path.with_name(f".{name}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        temporary.write_bytes(path.read_bytes())
    temporary.replace(path.with_name(name))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are accepted.

    Raises:
        UserError: the file is missing, damaged, unsafe, or holds no `state_dict`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist.") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} is damaged or holds more than tensors and plain values, which "
            "could run code; it is not loaded."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read: {reason}.") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"checkpoint {path} holds no 'state_dict'.")
    return checkpoint


def final_checkpoint(folder: Path) -> Path | None:
    """The kept checkpoint of the highest epoch in a step folder."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-epoch*.pth")
        if (match := re.fullmatch(r"checkpoint-epoch(\d+)\.pth", path.name))
    ]
    return max(found)[1] if found else None


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every global random generator, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
