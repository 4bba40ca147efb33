"""`IncrementalDataset`: the images of one step as network labels. Train, val, test and replay are
this one class with other ids, another lookup table and another transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from base.base_dataset import BaseDataset
from data_loader.transforms import Transform, normalize
from utils.misc import seed_from


class Sample(NamedTuple):
    """One image, or after collation a batch of N.

    Attributes:
        image: [3, H, W] uint8 RGB.
        label: [H, W] uint8; channel of the class, 0 = background, 255 = void. int32 with the
            largest int32 = void where the channels do not fit (`Task.label_table`).
        name: bare image id.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a batch, on a device: images [N, 3, H, W] float32, normalised, and labels."""
        images, labels = (part.to(device, non_blocking=True) for part in (self.image, self.label))
        return normalize(images), labels


class IncrementalDataset(Dataset):
    """Raw data set + image indices + label lookup table + transform."""

    def __init__(
        self,
        raw: BaseDataset,
        indices: Sequence[int] | np.ndarray,
        table: np.ndarray,
        transform: Transform,
        seed: Sequence[object] = (),
    ):
        """
        Args:
            raw: where the images come from.
            indices: which of its images belong to this set.
            table: from label id to training label (`Task.label_table`).
            transform: of the image and its labels, both PIL images, into tensors.
            seed: what, besides epoch and image, decides how a sample is transformed.
        """
        self.raw, self.transform, self.table = raw, transform, table
        self.indices = np.asarray(indices)
        self.seed = tuple(seed)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        """Bare image ids."""
        return [self.raw.entries[index].id for index in self.indices]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at a position, or at (position, epoch).

        What a sample looks like depends on (seed, epoch, image id) alone: never on the worker, the
        process, or where a run was resumed. So the generator is seeded here, and restored after.
        """
        position, epoch = key if isinstance(key, tuple) else (key, 0)
        index = self.indices[position]
        name = self.raw.entries[index].id
        image, mask = self.raw.load(index)
        if mask.dtype == self.table.dtype == np.uint8:
            label = Image.fromarray(mask).point(self.table.tolist())
        else:
            label = Image.fromarray(self.table[mask])
        state = torch.get_rng_state()
        # Not torch.manual_seed, which would seed the GPUs' generators as well.
        torch.default_generator.manual_seed(seed_from(*self.seed, epoch, name))
        try:
            return Sample(*self.transform(image, label), name)
        finally:
            torch.set_rng_state(state)


class Joined(Dataset):
    """Several data sets one after the other: a step's own images and its exemplars."""

    def __init__(self, parts: Sequence[IncrementalDataset]):
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        position, epoch = key if isinstance(key, tuple) else (key, 0)
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.parts[number][int(position - self.starts[number]), epoch]


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (position, epoch) keys for training, the same on any number of ranks.

    Rank r takes every world-th position of the epoch's permutation, so the ranks' i-th batches
    together are the i-th batch of a single process with the global batch size; so are `accumulate`
    batches of a rank after each other. The last partial global batch is dropped.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: Sequence[object],
        accumulate: int = 1,
    ):
        self.length, self.batch_size = length, batch_size
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.seed, self.epoch, self.skip = tuple(seed), 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the permutation, and how many iterations of it are done already."""
        self.epoch, self.skip = epoch, skip

    @property
    def iterations(self) -> int:
        """Iterations of an epoch, each of `accumulate` batches."""
        return self.length // (self.batch_size * self.world * self.accumulate)

    def __len__(self) -> int:
        return self.iterations * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_from(*self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        mine = order[self.rank :: self.world]
        for number in range(self.skip * self.accumulate, len(self)):
            start = number * self.batch_size
            yield [(position, self.epoch) for position in mine[start : start + self.batch_size]]


class OrderedShare(Sampler[int]):
    """Every world-th image in order, for evaluation: no image is counted twice."""

    def __init__(self, length: int, rank: int, world: int):
        self.positions = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)
