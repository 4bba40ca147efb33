"""The losses of an epoch: added up on the device, read now and then, judged when they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from utils.errors import UserError
from utils.logger import log
from utils.ranks import Ranks

READ_EVERY = 20  # iterations between two looks at the loss on a GPU, each of which waits for it
# Each skipped update halves the loss scale. Twenty in a row bring it from the 65,536 it starts with
# to 1/16, where it has long stopped to lift anything: what still overflows is the run itself.
MOST_SKIPPED = 20


class Update(NamedTuple):
    """What an iteration says of itself: scalars that stay on the device.

    Attributes:
        loss: the weighted sum of the terms.
        terms: mean over classes of each term.
        grad_norm: before the gradients are clipped; None when they are not.
        skipped: 1 when a gradient was not finite, else 0; None without a loss scale.
    """

    loss: torch.Tensor
    terms: Mapping[str, torch.Tensor]
    grad_norm: torch.Tensor | None = None
    skipped: torch.Tensor | None = None

    def values(self) -> dict[str, torch.Tensor]:
        """What is averaged over an epoch, by name."""
        norm = {} if self.grad_norm is None else {"grad_norm": self.grad_norm}
        return {"loss": self.loss, **self.terms, **norm}


class LossMeter:
    """Loss terms of an epoch, left on the device and read every few iterations."""

    def __init__(self, every: int):
        """
        Args:
            every: iterations between reads.
        """
        self.every = every
        self.in_a_row = 0  # updates skipped since the last one that was made
        self.scaled = False  # whether an update that is not finite is skipped
        self.begin("")

    def begin(self, where: str, advice: str = "") -> None:
        """Start an epoch.

        Args:
            where: step and epoch, for messages.
            advice: how to go on where the run ends by a loss that is not finite.
        """
        self.where, self.advice = where, advice
        self.names: tuple[str, ...] = ()
        self.waiting: list[tuple[int, Sequence[str], torch.Tensor]] = []
        self.total, self.recent = torch.zeros(0), torch.zeros(0)
        self.count = self.skipped = 0  # updates that were made, and those that were not

    def add(self, iteration: int, update: Update, images: Sequence[str]) -> bool:
        """Take the update of an iteration; True when it was read."""
        values = update.values()
        self.names = tuple(values)
        skipped = torch.zeros_like(update.loss) if update.skipped is None else update.skipped
        self.scaled = update.skipped is not None
        self.waiting.append((iteration, images, torch.stack([*values.values(), skipped])))
        if len(self.waiting) < self.every:
            return False
        self.read()
        return True

    def read(self) -> None:
        """Fetch what waits on the device.

        Raises:
            UserError: a loss is not finite and no loss scale skips the update, or too many updates
                in a row were skipped; names step, iteration, terms and images.
        """
        if not self.waiting:
            return
        values = torch.stack([value for *_, value in self.waiting]).double().cpu()
        values, made = values[:, :-1], values[:, -1] == 0
        for (iteration, images, _), row, updated in zip(self.waiting, values, made, strict=True):
            finite = bool(row.isfinite().all())
            if updated and finite:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, row, strict=True))
            fault = "the loss is" if not finite else "the gradients in float16 are"
            place = f"{fault} not finite at {self.where}, iteration {iteration}"
            which = f"{terms}; images of the batch: {', '.join(images)}"
            if not self.scaled or self.in_a_row == MOST_SKIPPED:
                times = f", the last of {MOST_SKIPPED} in a row" if self.scaled else ""
                raise UserError(
                    f"{place}{times}: {which}; lower the learning rate (--lr), set "
                    'trainer.clip_grad_norm, or with mixed precision try "amp_dtype": "bfloat16"'
                    f"{'; ' if self.advice else ''}{self.advice}."
                )
            details = f": {which}" if not finite else ""
            log.log(
                logging.INFO if finite else logging.WARNING,
                "%s, so the update is skipped and the loss scale halved (%d in a row; %d end the "
                "run)%s",
                place,
                self.in_a_row,
                MOST_SKIPPED,
                details,
            )
        self.skipped += len(values) - int(made.sum())
        if made.any():
            self.total = values[made].sum(0) + (self.total if self.count else 0)
            self.recent = values[made].mean(0)
            self.count += int(made.sum())
        self.waiting.clear()

    def means(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Mean of each term over the updates read so far, of all `ranks` when given."""
        total = self.total / self.count
        if ranks is not None:
            total = ranks.sum(total.to(ranks.device)) / ranks.world
        return self._named(total)

    def latest(self) -> dict[str, float]:
        """Mean of each term over the updates of the last read that had one."""
        return self._named(self.recent)

    def _named(self, values: torch.Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True)) if self.count else {}
