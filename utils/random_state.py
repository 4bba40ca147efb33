"""The state of every global random generator, as a checkpoint keeps it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from utils.errors import UserError, first_line


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every global random generator, as tensors and plain values."""
    bits = np.random.get_state(legacy=False)  # noqa: NPY002
    keys, position = bits["state"]["key"], bits["state"]["pos"]
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            *(bits["bit_generator"], torch.from_numpy(keys.astype(np.int64)), position),
            *(bits["has_gauss"], bits["gauss"]),
        ],
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned.

    Raises:
        UserError: a generator does not take its state.
    """
    try:
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], device)
        name, keys, *rest = state["numpy"]
        if keys.min() < 0 or keys.max() >= 2**32:
            raise ValueError("numpy: a number has more than 32 bits")
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the random state of the checkpoint cannot be restored: {first_line(error)}."
        ) from None
