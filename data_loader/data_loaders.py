"""The loaders of one step: batch sizes, order and processes, over the sets of `StepSets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from base.base_dataset import BaseDataset
from base.task import make_task
from data_loader import DATA_SETS
from data_loader.dataset import IncrementalDataset, Joined, OrderedShare, ShuffledBatches
from data_loader.loading import Loader
from data_loader.saliency import SaliencyMaps
from data_loader.step_sets import StepSets
from utils.errors import UserError
from utils.machine import keep_freed_memory
from utils.processes import children
from utils.ranks import SINGLE, Ranks


class IncrementalDataLoader(StepSets):
    """Task, image sets and loaders of one step.

    Its arguments are the keys of `data_loader.args`; see the config reference in the README.
    """

    def __init__(
        self,
        data_set: type[BaseDataset],
        *,
        task: Mapping[str, Any],
        train: Mapping[str, Any],
        val: Mapping[str, Any],
        test: Mapping[str, Any],
        memory: Mapping[str, Any],
        num_workers: int,
        pin_memory: bool,
        data_dir: str | None = None,
        follow_links: bool = False,
        saliency_dir: str | None = None,
        class_names: Sequence[str] | None = None,
        cache_dir: str | None = None,
        accumulate: int = 1,
        seed: int = 0,
        ranks: Ranks = SINGLE,
    ):
        """Check the task and read the lists; no image or mask is opened.

        Besides the keys of the config:

        Args:
            data_set: whose images these are.
            cache_dir, seed, ranks: as of `StepSets`.
            accumulate: `trainer.accumulate`.

        Raises:
            UserError: an unknown task, setting or step; a missing root or list.
        """
        splits = {"train": train, "val": val, "test": test}
        _check_batch_sizes(data_set, splits)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.accumulate = accumulate
        source = {
            split: data_set(split, data_dir, class_names, follow_links)
            for split in ("train", "val")
        }
        step = make_task(
            data_set.name,
            data_set.tables,
            source["val"].class_names,
            own_classes=class_names is not None,
            background=data_set.background,
            **{key: task[key] for key in ("name", "setting", "step", "steps", "joint")},
        )
        super().__init__(
            *(step, source, splits, memory),
            saliency=None if saliency_dir is None else SaliencyMaps(saliency_dir),
            lists_dir=task["idxs_path"],
            cache_dir=cache_dir,
            seed=seed,
            ranks=ranks,
        )

    def check_mix(self) -> None:
        """Raise `UserError` when half of a batch is asked for that has no half."""
        memory = self.memory_policy
        replays = self.task.step > 0 and memory["mem_size"] > 0
        if replays and memory["mix"] == "half_batch" and self.global_batch == 1:
            raise UserError(
                "data_loader.args.memory.mix is 'half_batch', but half of the global batch is "
                f"nothing: {self.batch_text()}; choose a larger one, or 'concat'."
            )

    @cached_property
    def train_batches(self) -> ShuffledBatches:
        """Which images are in which batch of `train_loader`; its `set_epoch` chooses the order.

        Raises:
            UserError: the step has fewer images than one global batch.
        """
        images, exemplars = len(self.train_set), sum(map(len, self.replay_sets))
        mixed = self.memory_policy["mix"] == "half_batch"
        batch_size, world = self.splits["train"]["batch_size"], self.ranks.world
        if not mixed:
            images, exemplars = images + exemplars, 0
        batches = ShuffledBatches(
            images,
            batch_size,
            self.ranks.rank,
            world,
            (self.seed, self.task.step),
            accumulate=self.accumulate,
            exemplars=exemplars,
        )
        if batches.iterations == 0:
            raise UserError(
                f"the training set of step {self.task.step} has {images} images, fewer than "
                f"one batch: {self.batch_text()}; choose a smaller one."
            )
        return batches

    @cached_property
    def train_loader(self) -> DataLoader:
        """Shuffled batches; call `train_batches.set_epoch(epoch)` before iterating.

        Raises:
            UserError: as `train_batches`.
        """
        images = Joined([self.train_set, *self.replay_sets])
        return self._loader(images, batch_sampler=self.train_batches)

    @property
    def global_batch(self) -> int:
        """Images of one iteration, over all processes."""
        return self.splits["train"]["batch_size"] * self.ranks.world * self.accumulate

    @property
    def norm_batch(self) -> int:
        """Images that a BatchNorm which is not frozen sees at a time; GPUs synchronise theirs."""
        alone = self.ranks.device.type != "cuda"
        return self.splits["train"]["batch_size"] * (1 if alone else self.ranks.world)

    def batch_text(self) -> str:
        """How the global batch comes about, for messages."""
        return (
            f"data_loader.args.train.batch_size (--batch_size) "
            f"{self.splits['train']['batch_size']} × {self.ranks.world} process(es) × "
            f"{self.accumulate} accumulated (trainer.accumulate) = {self.global_batch}"
        )

    def candidate_loader(self) -> DataLoader:
        """The candidates of the replay memory, in order, all on this rank."""
        whole = self.memory_policy["candidates"] == "whole"
        batch_size = 1 if whole else self.splits["train"]["batch_size"]
        return self._loader(self.candidate_set(), batch_size=batch_size)

    @cached_property
    def val_loader(self) -> DataLoader:
        """This rank's share of the validation images, in order."""
        return self._share(self.val_set, "val")

    @cached_property
    def test_loader(self) -> DataLoader:
        """This rank's share of the test images, in order."""
        return self._share(self.test_set, "test")

    def other_test_loader(self) -> DataLoader:
        """This rank's share of the test images without a class seen yet."""
        return self._share(self.other_test_set(), "test")

    def _share(self, dataset: IncrementalDataset, kind: str) -> DataLoader:
        share = OrderedShare(len(dataset), self.ranks.rank, self.ranks.world)
        return self._loader(dataset, sampler=share, batch_size=self.splits[kind]["batch_size"])

    def _loader(self, dataset: IncrementalDataset | Joined, **kwargs: Any) -> DataLoader:
        return Loader(
            dataset,
            num_workers=self.num_workers,
            # Asked of this run, not of the machine: pinning takes memory on the GPU as well.
            pin_memory=self.pin_memory and self.ranks.device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=children.start_method(self.num_workers),
            # The loader draws a seed for its workers; a generator of its own keeps that draw from
            # moving torch's global one, on which dropout depends.
            generator=torch.Generator().manual_seed(0),
            **kwargs,
        )


def _check_batch_sizes(
    data_set: type[BaseDataset], splits: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise `UserError` where images of their own sizes would have to be stacked."""
    for kind, block in splits.items():
        why = "" if block["args"]["transform"] else ".args.transform is false"
        if kind != "train" and data_set.evaluation == "whole":
            why = f": {data_set.name} is evaluated on whole images"
        if why and block["batch_size"] > 1:
            raise UserError(
                f"data_loader.args.{kind}{why}, so images keep their own sizes and cannot be "
                f"stacked; set data_loader.args.{kind}.batch_size to 1."
            )


def _start_worker(number: int) -> None:
    children.leave_to_parent(number)
    keep_freed_memory()


def loaders() -> dict[str, Callable[..., IncrementalDataLoader]]:
    """What makes the loaders of a data set, by `data_loader.type`."""
    return {name: partial(IncrementalDataLoader, data_set) for name, data_set in DATA_SETS.items()}
