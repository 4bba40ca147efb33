"""TensorBoard's events of a step: scalars, the config, pictures of validations.

Without `trainer.tensorboard`, and on all ranks but the first, TensorBoard is
not imported and nothing is computed or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trainer.evaluation import Evaluation
from utils.parse_config import ConfigParser
from utils.pictures import occurring, palette_image, sheet
from utils.ranks import Ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SIDE = 192  # pixels of a picture


class TensorBoard:
    """Writes what a step tells TensorBoard into its log folder, beginning with the first scalar."""

    def __init__(self, config: ConfigParser, ranks: Ranks):
        """
        Args:
            config: the effective configuration.
            ranks: only rank 0 writes.
        """
        self.config = config
        self.on = config["trainer"]["tensorboard"] and ranks.is_main
        self.writer: SummaryWriter | None = None

    def close(self) -> None:
        """Flush the events."""
        if self.writer is not None:
            self.writer.close()

    def scalars(self, values: Mapping[str, float], kind: str, at: int) -> None:
        """Write values as `KIND/NAME`.

        Args:
            values: by name.
            kind: "train", "val" or "test".
            at: the iteration of the step for "train", else the epoch.
        """
        if not self.on:
            return
        if self.writer is None:
            self.writer = self._begin(at if kind == "train" else None)
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, at)

    def _begin(self, at: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, few ask for it

        # What a killed run wrote from here on is trained, and written, again.
        writer = SummaryWriter(str(self.config.log_dir()), purge_step=at)
        text = json.dumps(self.config.as_dict(), indent=4)
        writer.add_text("config", f"```\n{text}\n```", at)
        return writer

    def pictures(self, evaluation: Evaluation, epoch: int) -> None:
        """Write the first validation images, their labels and the student's answers."""
        if self.writer is None:
            return
        rows, maps = [], list[np.ndarray]()
        for image, labels, preds in evaluation.examples():
            rows.append([Image.fromarray(image), palette_image(labels), palette_image(preds)])
            maps += labels, preds
        if rows:
            task = evaluation.task
            names = {label: task.class_names[label] for label in task.seen}
            picture = sheet(("image", "truth", "prediction"), rows, occurring(names, *maps), SIDE)
            self.writer.add_image("val/examples", np.asarray(picture), epoch, dataformats="HWC")
