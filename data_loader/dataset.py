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
from base.batch import Batch
from data_loader.saliency import SaliencyMaps
from data_loader.transforms import Transform, normalize
from utils.seeds import seed_from

NO_MAP = torch.empty(0, dtype=torch.uint8)


class Sample(NamedTuple):
    """One image, or after collation a batch of N.

    Attributes:
        image: [3, H, W] uint8 RGB.
        label: [H, W] uint8; channel of the class, 0 = background, 255 = void. int32 with the
            largest int32 = void where the channels do not fit (`Task.label_table`). Of a test, row
            of the wide confusion matrix (`Task.wide_table`), which begins with the channels.
        name: bare image id.
        saliency: [H, W] uint8, 1 = salient; without maps [0], which costs nothing.
        replayed: whether it is an exemplar of the memory; of a batch, [N] bool.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str
    saliency: torch.Tensor = NO_MAP
    replayed: bool = False

    def on(self, device: torch.device) -> Batch:
        """A batch on a device, normalised; what it does not have is None."""

        def moved(part: torch.Tensor) -> torch.Tensor:
            return part.to(device, non_blocking=True)

        replayed = torch.as_tensor(self.replayed)
        return Batch(
            normalize(moved(self.image)),
            moved(self.label),
            saliency=moved(self.saliency) if self.saliency.numel() else None,
            replayed=moved(replayed) if replayed.any() else None,
        )


class IncrementalDataset(Dataset):
    """Data set + image indices + label lookup table + transform."""

    def __init__(
        self,
        source: BaseDataset,
        indices: Sequence[int] | np.ndarray,
        table: np.ndarray,
        transform: Transform,
        seed: Sequence[object] = (),
        maps: SaliencyMaps | None = None,
    ):
        """
        Args:
            indices: which images of `source` belong to this set.
            table: from label id to training label (`Task.label_table`).
            transform: of the image and its maps, all PIL images, into tensors.
            seed: what, besides epoch and image, decides how a sample is transformed.
        """
        self.source, self.transform, self.table, self.maps = source, transform, table, maps
        self.indices = np.asarray(indices)
        self.seed = tuple(seed)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        """Bare image ids."""
        return [self.source.entries[index].id for index in self.indices]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at a position, or at (position, epoch).

        What a sample looks like depends on (seed, epoch, image id) alone: never on the worker, the
        process, or where a run was resumed. So the generator is seeded here, and restored after.
        """
        position, epoch = key if isinstance(key, tuple) else (key, 0)
        index = self.indices[position]
        entry = self.source.entries[index]
        image, mask = self.source.load(index)
        if mask.dtype == self.table.dtype == np.uint8:
            label = Image.fromarray(mask).point(self.table.tolist())
        else:
            label = Image.fromarray(self.table[mask])
        pictures = [image, label]
        if self.maps is not None:
            pictures.append(Image.fromarray(self.maps.read(self.source, entry, image.size)))
        state = torch.get_rng_state()
        # Not torch.manual_seed, which would seed the GPUs' generators as well.
        torch.default_generator.manual_seed(seed_from(*self.seed, epoch, entry.id))
        try:
            pixels, labels, *saliency = self.transform(*pictures)
            return Sample(pixels, labels, entry.id, saliency[0] if saliency else NO_MAP)
        finally:
            torch.set_rng_state(state)


class Joined(Dataset):
    """A step's own images, then its exemplars, whose samples say that they are replayed."""

    def __init__(self, parts: Sequence[IncrementalDataset]):
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        position, epoch = key if isinstance(key, tuple) else (key, 0)
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        sample = self.parts[number][int(position - self.starts[number]), epoch]
        return sample._replace(replayed=True) if number else sample


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (position, epoch) keys for training, the same on any number of ranks.

    Rank r takes every world-th position of the epoch's permutation, so the ranks' i-th batches
    together are the i-th batch of a single process with the global batch size; so are `accumulate`
    batches of a rank after each other. The last partial global batch is dropped.

    With `exemplars`, half of each global batch, chosen at random, gives way to some of them (the
    replay of SSUL-M). They come in permutations, one after the other, and none comes twice in a
    batch that does not need it. The second number of such a key is not the epoch but another one
    for each draw, so that an exemplar that is drawn a hundred times in an epoch comes in a hundred
    crops.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: Sequence[object],
        accumulate: int = 1,
        exemplars: int = 0,
    ):
        """
        Args:
            length: number of images that an epoch passes through, positions 0 … length - 1.
            batch_size: of a rank.
            seed: what, besides the epoch, decides the order.
            accumulate: batches of an iteration.
            exemplars: number of images that take half of each batch, at the positions after those.
        """
        self.length, self.batch_size, self.exemplars = length, batch_size, exemplars
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.seed, self.epoch, self.skip = tuple(seed), 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the permutation, and how many iterations of it are done already."""
        self.epoch, self.skip = epoch, skip

    @property
    def global_batch(self) -> int:
        """Images of an iteration."""
        return self.batch_size * self.world * self.accumulate

    @property
    def iterations(self) -> int:
        """Iterations of an epoch, each of `accumulate` batches."""
        return self.length // self.global_batch

    def __len__(self) -> int:
        return self.iterations * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_from(*self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        keys = [(position, self.epoch) for position in order]
        if self.exemplars:
            self._replace_half(keys)
        share = keys[self.rank :: self.world]
        for number in range(self.skip * self.accumulate, len(self)):
            start = number * self.batch_size
            yield share[start : start + self.batch_size]

    def _replace_half(self, keys: list[tuple[int, int]]) -> None:
        """Put exemplars in a random half of each iteration's places in the epoch's order."""
        generator = torch.Generator().manual_seed(seed_from(*self.seed, "mix", self.epoch))
        size, waiting = self.global_batch, list[int]()
        half = size // 2
        for start in range(0, self.iterations * size, size):
            while len(waiting) < half:
                fresh = torch.randperm(self.exemplars, generator=generator).tolist()
                # Those that still wait from the last permutation come last in this one.
                waiting += sorted(fresh, key=waiting.__contains__)
            chosen = torch.randperm(size, generator=generator)[:half].tolist()
            for place, exemplar in zip(chosen, waiting[:half], strict=True):
                draw = self.epoch * self.length + start + place
                keys[start + place] = (self.length + exemplar, draw)
            del waiting[:half]


class OrderedShare(Sampler[int]):
    """Every world-th image in order, for evaluation: no image is counted twice."""

    def __init__(self, length: int, rank: int, world: int):
        self.positions = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)
