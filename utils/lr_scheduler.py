"""Learning rate per iteration as a closed form of the iteration number.

Built by `trainer/optim.py` from the config's `lr_scheduler` block; stepped once per iteration.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class PolyLR(LRScheduler):
    """lr · (1 − i / max_iters) ^ power at iteration i, and never below `min_lr`."""

    def __init__(
        self, optimizer: Optimizer, max_iters: int, power: float = 0.9, min_lr: float = 0.0
    ):
        self.max_iters, self.power, self.min_lr = max_iters, power, min_lr
        super().__init__(optimizer)

    def factor(self, iteration: int) -> float:
        """What the base learning rate is multiplied by."""
        return (1 - min(iteration, self.max_iters) / self.max_iters) ** self.power

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at the present iteration."""
        factor = self.factor(self.last_epoch)
        return [max(base * factor, self.min_lr) for base in self.base_lrs]

    def state_dict(self) -> dict[str, int]:
        """Where the schedule stands; its shape comes from the config."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the iteration of `state_dict` and set the learning rates of that point."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class WarmupPolyLR(PolyLR):
    """`PolyLR` times a linear warm-up from `WARMUP_START` to 1.

    Args:
        warmup_iters: share of `max_iters` that warms up.
    """

    WARMUP_START = 0.001

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        power: float = 0.9,
        warmup_iters: float = 0.2,
        min_lr: float = 0.0,
    ):
        self.warmup = warmup_iters * max_iters
        super().__init__(optimizer, max_iters, power, min_lr)

    def factor(self, iteration: int) -> float:
        """What the base learning rate is multiplied by."""
        poly = super().factor(iteration)
        if iteration >= self.warmup:
            return poly
        share = iteration / self.warmup
        return poly * (self.WARMUP_START * (1 - share) + share)


SCHEDULERS: dict[str, type[LRScheduler]] = {cls.__name__: cls for cls in (PolyLR, WarmupPolyLR)}
