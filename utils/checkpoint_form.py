"""What a checkpoint holds: a table of its keys, what counts as weights, and which values are none.

Knows no file, model or optimizer: whether tensors fit those is judged where they are loaded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.config_schema import Key
from utils.errors import UserError, listing, shortened
from utils.forms import (
    COUNT,
    FLAG,
    PLAIN,
    REAL,
    REAL_OR_NONE,
    TEXT,
    TEXT_OR_NONE,
    Maybe,
    shown,
)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_NAMES = 3  # in a message


@dataclass(frozen=True)
class Values:
    """The form of a tensor.

    Attributes:
        dtype: of whole numbers just this one; of others any of `FLOATING`.
        shape: None: any.
        optional: None may stand in its place.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] | None = None
    optional: bool = False

    def expected(self) -> str:
        """What is valid, for a message."""
        shape = "" if self.shape is None else f" {list(self.shape)}"
        return f"a tensor of {kind(self.dtype)}{shape}{' or null' if self.optional else ''}"

    def accepts(self, value: Any) -> bool:
        """Whether it is that."""
        if value is None:
            return self.optional
        return (
            without_values(value) is None
            and (value.dtype == self.dtype or {value.dtype, self.dtype} <= {*FLOATING})
            and self.shape in (None, tuple(value.shape))
        )


UINT32 = Key("", (int,), 0, most=2**32 - 1)
RNG = {
    "torch": Values(torch.uint8),
    "cuda": Values(torch.uint8, optional=True),
    "numpy": (
        Key("", (str,), choices=("MT19937",)),
        Values(torch.int64, (624,)),
        Key("", (int,), 0, most=624),
        Key("", (int,), choices=(0, 1)),
        REAL,
    ),
    "python": (Key("", (int,), choices=(random.Random.VERSION,)), (UINT32,) * 625, REAL_OR_NONE),
}
DATA = {"train": torch.int64, "val": torch.int64, "trained": torch.uint8}
# Beside `state_dict`. A checkpoint to go on from has all of it; released weights have none.
FORM: dict[str, Any] = {
    "optimizer": {"state": {}, "param_groups": [{"params": [COUNT], "lr": REAL}]},
    "rng": [RNG],  # of each process
    "finished": FLAG,
    "record": {
        "version": TEXT,
        "code": TEXT,
        "torch": TEXT,
        "contents": Maybe(TEXT_OR_NONE),  # older files have none, nor the next
        "lengthened": Maybe([COUNT]),
        "settings": {...: PLAIN},
    },
    "previous": Maybe(TEXT_OR_NONE),
    "data": Maybe({name: Maybe(Values(kind)) for name, kind in DATA.items()}),
    "epoch": COUNT,  # the epochs that are done
    "iteration": COUNT,  # of the next epoch
    "monitor_best": REAL_OR_NONE,
    "since_best": COUNT,
    "task": {"dataset": TEXT, "name": TEXT, "setting": TEXT, "step": COUNT, "steps": [[COUNT]]},
    "method": TEXT,
    "family": TEXT,
    "method_state": {},
    "lr_scheduler": {"last_epoch": COUNT},
    "scaler": {},
}
# What only training that goes on needs: larger than the weights.
TRAINING_STATE = frozenset({"optimizer", "lr_scheduler", "scaler", "rng"})
# What others than the step itself read of it; of foreign files the rest may be as it likes.
READ_BY_ALL = (
    *("epoch", "finished", "method", "family", "task", "record", "method_state"),
    *("previous", "data"),
)


def check_weights(state: Any, source: str) -> None:
    """Whether `state` holds tensors by name, each a plain one with values of its own.

    Raises:
        UserError: it does not; `source` is what it is of.
    """
    if not isinstance(state, dict):
        raise UserError(f"{source}: the weights are {shown(state)}, but must be tensors by name.")
    wrong = [f"the name {shown(name)}" for name in state if not isinstance(name, str)]
    faults = ((name, without_values(tensor)) for name, tensor in state.items())
    wrong += [f"{shortened(str(name))} ({why})" for name, why in faults if why is not None]
    if wrong:
        raise UserError(
            f"{source}: {len(wrong)} of {len(state)} entries are no weights: "
            f"{listing(wrong, most=MOST_NAMES)}."
        )


def without_values(value: Any) -> str | None:
    """Why this is no plain tensor of real numbers, in a few words; None where it is one."""
    if not isinstance(value, torch.Tensor):
        return shown(value)
    if value.layout is not torch.strided:
        return f"of the layout {kind(value.layout)}"
    if value.dtype not in (*FLOATING, *WHOLE):
        return f"of {kind(value.dtype)}"
    if value.is_meta:
        return "without values"
    # Otherwise a file of a few bytes could claim a tensor that takes for ever to read.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "one value shown many times"
    return None


def kind(dtype: torch.dtype | torch.layout) -> str:
    """The name of a data type or a layout without its module."""
    return str(dtype).removeprefix("torch.")


def not_finite(tree: Mapping[str, Any]) -> str | None:
    """Which tensors and numbers in nested dicts and lists are not finite, in words.

    The smallest and the largest value of each tensor are enough to tell, and on a GPU they are
    waited for once: 59 million weights take 0.05 s on a core. A float64 counts as the float32 that
    the networks compute in.

    Returns:
        Such as `3 values of 2 tensors are not finite: a.weight (2), a.bias (1)`; None when all are.
    """
    tensors: dict[str, torch.Tensor] = {}
    left: list[tuple[str, Any]] = [(str(name), value) for name, value in tree.items()]
    for where, value in left:  # grows on the way
        if isinstance(value, dict):
            left += [(f"{where}.{key}", each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{where}[{at}]", each) for at, each in enumerate(value)]
        elif isinstance(value, float):
            tensors[where] = torch.tensor(value)
        elif without_values(value) is None and value.is_floating_point() and value.numel():
            tensors[where] = value.detach()
    for device in {tensor.device for tensor in tensors.values()}:
        there = [tensor for tensor in tensors.values() if tensor.device == device]
        extremes = torch.stack([edge for tensor in there for edge in tensor.aminmax()])
        if not extremes.float().isfinite().all():
            break
    else:
        return None
    counts = {name: int((~tensor.float().isfinite()).sum()) for name, tensor in tensors.items()}
    faults = [f"{name} ({count:,})" for name, count in counts.items() if count]
    return (
        f"{sum(counts.values()):,} values of {len(faults)} tensors are not finite: "
        f"{listing(faults, most=MOST_NAMES)}"
    )
