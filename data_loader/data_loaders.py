"""The loader bundles: from the `data_loader` block of a config to the task and its loaders.

One class does the work; a data set adds its raw class and its table of schedules. Built by
`trainer/run.py`, which hands over the seed and this process' rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.base_dataset import BaseDataset
from base.task import Task, make_task
from data_loader.ade import ADE
from data_loader.dataset import IncrementalDataset, OrderedShare, ShuffledBatches
from data_loader.splits import (
    compare_with_published,
    list_hash,
    presence_table,
    published_file,
    read_published,
    select,
)
from data_loader.task_tables import ADE_TASKS, VOC_TASKS
from data_loader.transforms import EvalTransform, NoTransform, TrainTransform
from data_loader.voc import VOC
from utils.distributed import SINGLE, Ranks
from utils.logger import log
from utils.misc import UserError, seed_from

HELD_OUT = 0.2  # share of the training images that cross_val validates on


class IncrementalDataLoader:
    """Task, data sets and loaders of one step.

    Its arguments are the keys of `data_loader.args`; see the config reference in the README.
    """

    raw_class: type[BaseDataset]
    tables: dict[str, Sequence[Sequence[int]]]

    def __init__(
        self,
        *,
        task: Mapping[str, Any],
        train: Mapping[str, Any],
        val: Mapping[str, Any],
        test: Mapping[str, Any],
        memory: Mapping[str, Any],
        num_workers: int,
        pin_memory: bool,
        data_dir: str | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        ranks: Ranks = SINGLE,
    ):
        """Check the task and read the lists; images and masks wait until a loader is asked for.

        `memory` concerns training alone, which refuses replay until there is one.

        Raises:
            UserError: an unknown task, setting or step; a missing root or list.
        """
        for kind, block in (("train", train), ("val", val), ("test", test)):
            if not block["args"]["transform"] and block["batch_size"] > 1:
                raise UserError(
                    f"data_loader.args.{kind}.args.transform is false, so images keep their own "
                    f"sizes and cannot be stacked; set data_loader.args.{kind}.batch_size to 1."
                )
        if class_names is not None:
            _check_class_names(class_names)
        self.blocks = {"train": train, "val": val, "test": test}
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.seed, self.ranks = seed, ranks
        self.lists_dir = task["idxs_path"]
        self.raw = {
            split: self.raw_class(split, data_dir, class_names) for split in ("train", "val")
        }
        self.task: Task = make_task(
            self.raw_class.name,
            self.tables,
            self.raw["val"].class_names,
            own_classes=class_names is not None,
            **{key: task[key] for key in ("name", "setting", "step", "steps")},
        )

    # ------------------------------------------------------------------------------- data sets
    @cached_property
    def train_set(self) -> IncrementalDataset:
        """Training images of the step, randomly transformed."""
        kept = self.task.seen if self.task.setting == "sequential" else self.task.new
        return self._dataset("train", self._train_and_held_out[0], "train", kept)

    @cached_property
    def val_set(self) -> IncrementalDataset:
        """Validation images of the step: labels of the new classes."""
        if self.blocks["val"]["cross_val"]:
            return self._dataset("train", self._train_and_held_out[1], "val", self.task.new)
        return self._dataset("val", self._indices("val", "val"), "val", self.task.new)

    @cached_property
    def test_set(self) -> IncrementalDataset:
        """Test images of the step: labels of all seen classes."""
        return self._dataset("val", self._indices("val", "test"), "test", self.task.seen)

    @cached_property
    def _train_and_held_out(self) -> tuple[np.ndarray, np.ndarray]:
        indices = self._indices("train", "train")
        if not self.blocks["val"]["cross_val"]:
            return indices, indices[:0]
        generator = np.random.default_rng(seed_from(self.seed, "cross_val", self.task.step))
        order = generator.permutation(len(indices))
        held_out = round(HELD_OUT * len(indices))
        if held_out == 0:
            raise UserError(
                f"data_loader.args.val.cross_val: the step has {len(indices)} training images, too "
                "few to hold a fifth out; set it to false."
            )
        return indices[np.sort(order[held_out:])], indices[np.sort(order[:held_out])]

    def _indices(self, split: str, kind: str) -> np.ndarray:
        """Images of the step: from the published list when it is there, else by the rule."""
        raw, path = self.raw[split], published_file(self.task, kind, self.lists_dir)
        if path is not None:
            indices = read_published(path, raw)
            source = f"from {path}"
        else:
            with self.ranks.main_first():  # one process scans, the others read its cache
                presence = presence_table(raw, self.lists_dir)
            indices = select(presence, self.task, kind)
            source = "by the rule"
        if len(indices) == 0 and kind == "val":
            log.warning("no validation image holds a new class: validations will say nothing")
        elif len(indices) == 0:
            raise UserError(
                f"no image of {raw.root} belongs to the {kind} set of step {self.task.step} of "
                f"task '{self.task.name}' ({self.task.setting}); choose another task or setting."
            )
        ids = [raw.entries[index].id for index in indices]
        log.info(
            "%s list: %d images %s, sha256 %s…, %s",
            *(kind, len(ids), source, list_hash(ids)[:16]),
            compare_with_published(ids, self.task, kind),
        )
        return indices

    def _dataset(
        self, split: str, indices: np.ndarray, kind: str, kept: Sequence[int]
    ) -> IncrementalDataset:
        args = self.blocks[kind]["args"]
        if not args["transform"]:
            transform = NoTransform()
        else:
            preset = TrainTransform if kind == "train" else EvalTransform
            transform = preset(args["transform_args"]["crop_size"])
        table = self.task.label_table(kept, args["masking_value"])
        seed = (self.seed, self.task.step)
        return IncrementalDataset(self.raw[split], indices, table, transform, seed)

    # --------------------------------------------------------------------------------- loaders
    @cached_property
    def train_loader(self) -> DataLoader:
        """Shuffled batches; call `train_loader.batch_sampler.set_epoch(epoch)` before iterating.

        Raises:
            UserError: the step has fewer images than one global batch.
        """
        images, batch_size = len(self.train_set), self.blocks["train"]["batch_size"]
        batches = ShuffledBatches(
            images, batch_size, self.ranks.rank, self.ranks.world, (self.seed, self.task.step)
        )
        if len(batches) == 0:
            raise UserError(
                f"the training set of step {self.task.step} has {images} images, fewer than one "
                f"batch: data_loader.args.train.batch_size (--batch_size) is {batch_size} on "
                f"{self.ranks.world} process(es); choose a smaller one."
            )
        return self._loader(self.train_set, batch_sampler=batches)

    @cached_property
    def val_loader(self) -> DataLoader:
        """This rank's share of the validation images, in order."""
        return self._share(self.val_set, "val")

    @cached_property
    def test_loader(self) -> DataLoader:
        """This rank's share of the test images, in order."""
        return self._share(self.test_set, "test")

    def _share(self, dataset: IncrementalDataset, kind: str) -> DataLoader:
        share = OrderedShare(len(dataset), self.ranks.rank, self.ranks.world)
        return self._loader(dataset, sampler=share, batch_size=self.blocks[kind]["batch_size"])

    def _loader(self, dataset: IncrementalDataset, **kwargs: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # The loader draws a seed for its workers; a generator of its own keeps that draw from
            # moving torch's global one, on which dropout depends.
            generator=torch.Generator().manual_seed(0),
            **kwargs,
        )


def _check_class_names(names: Sequence[str]) -> None:
    where = "data_loader.args.class_names"
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} must be a list of names, background first.")
    if not 2 <= len(names) <= 255:
        raise UserError(f"{where} has {len(names)} names; between 2 and 255 are possible.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where} has the name '{twice[0]}' more than once.")


class VOCIncrementalDataLoader(IncrementalDataLoader):
    """PASCAL VOC 2012, or own data in its layout."""

    raw_class = VOC
    tables = VOC_TASKS


class ADEIncrementalDataLoader(IncrementalDataLoader):
    """ADE20K with its 150 classes."""

    raw_class = ADE
    tables = ADE_TASKS


LOADERS: dict[str, type[IncrementalDataLoader]] = {
    cls.__name__: cls for cls in (VOCIncrementalDataLoader, ADEIncrementalDataLoader)
}
