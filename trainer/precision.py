"""Half precision and the update: autocast, loss scale, clipped gradients, skipped updates.

Knows no model and no loss term.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch

from utils.config_schema import NUMBER, Key
from utils.errors import UserError
from utils.forms import COUNT, fault
from utils.parse_config import ConfigParser

# Of a loss scale, what changes from update to update.
SCALE = {"scale": Key("", NUMBER, above=0), "_growth_tracker": COUNT}


class Precision:
    """What the networks compute in, and the loss scale that float16 needs.

    Attributes:
        device: type of the device.
        dtype: of the networks' products in training; float32 without mixed precision.
        scaler: the loss scale; does nothing unless `dtype` is float16.
    """

    def __init__(self, device: str, dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    @classmethod
    def of(cls, config: ConfigParser, device: torch.device) -> Precision:
        """As `use_amp` and `amp_dtype` have it; on a CPU float32."""
        mixed = config["use_amp"] and device.type == "cuda"
        return cls(device.type, getattr(torch, config["amp_dtype"] if mixed else "float32"))

    @property
    def scaled(self) -> bool:
        """Whether an update that is not finite is skipped instead of made."""
        return self.scaler.is_enabled()

    def autocast(self, on: bool = True) -> torch.amp.autocast:
        """A context in which networks compute in `dtype`, or when not `on` in float32."""
        half = on and self.dtype is not torch.float32
        return torch.amp.autocast(self.device, self.dtype, enabled=half)

    def load_scale(self, state: Mapping[str, Any]) -> None:
        """Go on with the loss scale of a checkpoint that has one.

        Raises:
            UserError: it is something else.
        """
        if not self.scaled or not state:
            return
        if wrong := fault(state, SCALE, "scaler"):
            raise UserError(f"the checkpoint to resume from: {wrong}.")
        own = self.scaler.state_dict()
        self.scaler.load_state_dict(own | {name: state[name] for name in SCALE})

    def name(self, on: bool = True) -> str:
        """The data type inside `autocast(on)`, for logs and reports."""
        kind = str(self.dtype if on else torch.float32).removeprefix("torch.")
        # By name: a type checker does not know it.
        convolutions = attrgetter("cudnn.conv.fp32_precision")(torch.backends)
        if kind == "float32" and self.device == "cuda" and convolutions == "tf32":
            return "float32, TF32 allowed"  # torch's own default
        return kind

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, lifted by the scale, to the parameters'.

        A loss that is not finite may still have finite gradients: a logit beyond float16 has the
        score 1. Under a loss scale they become NaN as well, so that all ranks skip the update.
        """
        seed = torch.where(loss.isfinite(), 1.0, torch.nan) if self.scaled else None
        self.scaler.scale(loss).backward(seed)

    def step(
        self, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Update the parameters; under a loss scale only if every gradient is finite.

        Args:
            optimizer: of parameters that hold their gradients.
            clip: the gradients are shortened to this norm when they are longer.

        Returns:
            Scalars on the device: the norm before it is clipped, when `clip` is given; under a
            loss scale whether the update was skipped, 1 or 0.
        """
        norm = None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if clip is not None:
            self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        if not self.scaled:
            optimizer.step()
            return norm, None
        one = torch.ones((), device=parameters[0].device)
        before = self.scaler.scale(one)
        self.scaler.step(optimizer)
        self.scaler.update()
        # The scale falls exactly when the update is skipped; asking so makes no host wait.
        return norm, (self.scaler.scale(one) < before).float()
