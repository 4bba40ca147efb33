"""The loader bundles: from the `data_loader` block of a config to the task and its loaders.

One class does the work; what differs between data sets, their raw classes say. Built by
`trainer/run.py`, which hands over the seed and this process' rank, and set up by one call on all
ranks; from then on, nothing here scans, writes or waits for another rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.base_dataset import BaseDataset
from base.task import Task, make_task
from data_loader import DATA_SETS
from data_loader.contents import UNREADABLE, contents_table, unreadable
from data_loader.dataset import IncrementalDataset, Joined, OrderedShare, ShuffledBatches
from data_loader.leakage import Part, allowed, audit
from data_loader.loading import Loader
from data_loader.saliency import SaliencyMaps
from data_loader.splits import (
    HELD_OUT,
    compare_with_published,
    derive,
    equals_published,
    has_published,
    holding_void,
    list_hash,
    presence_table,
    published_file,
    read_published,
    select,
)
from data_loader.transforms import NoTransform, TrainTransform, Transform, eval_transform
from utils.errors import UserError
from utils.labels import VOID, WIDE_VOID, ranges
from utils.logger import log
from utils.machine import keep_freed_memory
from utils.processes import children
from utils.ranks import SINGLE, Ranks
from utils.seeds import seed_from


def _start_worker(number: int) -> None:
    children.leave_to_parent(number)
    keep_freed_memory()


class IncrementalDataLoader:
    """Task, data sets and loaders of one step.

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
            cache_dir: where the presence of classes is cached; default: `task.idxs_path`.
            accumulate: `trainer.accumulate`.
            seed: of samples and order.
            ranks: this process.

        Raises:
            UserError: an unknown task, setting or step; a missing root or list.
        """
        for kind, block in (("train", train), ("val", val), ("test", test)):
            why = "" if block["args"]["transform"] else ".args.transform is false"
            if kind != "train" and data_set.evaluation == "whole":
                why = f": {data_set.name} is evaluated on whole images"
            if why and block["batch_size"] > 1:
                raise UserError(
                    f"data_loader.args.{kind}{why}, so images keep their own sizes and cannot be "
                    f"stacked; set data_loader.args.{kind}.batch_size to 1."
                )
        self.data_set = data_set
        self.blocks = {"train": train, "val": val, "test": test}
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.seed, self.ranks = seed, ranks
        self.accumulate = accumulate
        self.lists_dir = task["idxs_path"]
        self.cache_dir = cache_dir or self.lists_dir
        self.memory_policy = memory
        self.saliency = None if saliency_dir is None else SaliencyMaps(saliency_dir)
        self.replay_sets: list[IncrementalDataset] = []
        self._replay_origins: list[int] = []
        self._presences: dict[str, np.ndarray] = {}
        self._sets: dict[str, IncrementalDataset] = {}
        self._tables: dict[str, np.ndarray] = {}
        self.raw = {
            split: data_set(split, data_dir, class_names, follow_links)
            for split in ("train", "val")
        }
        self.task: Task = make_task(
            data_set.name,
            data_set.tables,
            self.raw["val"].class_names,
            own_classes=class_names is not None,
            background=data_set.background,
            **{key: task[key] for key in ("name", "setting", "step", "steps", "joint")},
        )

    # ------------------------------------------------------------------------------- data sets
    def setup(self, *kinds: str) -> None:
        """Find the images of the step; every rank calls it, before anything else is asked for.

        Rank 0 scans masks whose classes are not cached, the others read its cache.

        Args:
            kinds: the sets that are needed: "train" (and the replay's candidates), "val", "test".

        Raises:
            UserError: a list or a mask is faulty, no image belongs to a set, or a training image
                has no saliency map where they are asked for.
        """
        splits = {
            split
            for kind in kinds
            # With a published list nobody has to scan, but the audit of what is trained on asks.
            if (split := self._split(kind)) == "train"
            or published_file(self.task, kind, self.lists_dir) is None
        }
        with self.ranks.main_first():
            for split in sorted(splits):
                self._presences[split] = presence_table(self.raw[split], self.cache_dir)
        self._sets = {kind: self._make(kind) for kind in kinds}
        for split in sorted(splits) if self.ranks.is_main else ():
            if words := self.raw[split].left_out:
                log.info("%s images: left out of %s", split, words)
            if words := self._without_class(split):
                log.warning("%s", words)

    def _split(self, kind: str) -> str:
        """The split whose images a set takes."""
        held_out = kind == "val" and self.blocks["val"]["cross_val"]
        return "train" if kind == "train" or held_out else "val"

    def _make(self, kind: str) -> IncrementalDataset:
        if kind == "train":
            indices = self._train_and_held_out(self.task)[0]
            return self._training(indices, allowed(self.task), self.seed, self.task.step)
        split = self._split(kind)
        if split == "train":
            indices = self._train_and_held_out(self.task)[1]
        else:
            indices = self._indices(self.task, kind)
        table = self.task.wide_table()
        if kind == "val":
            table = self.task.label_table(self.task.new, self.masking_value("val"))
        seed = (self.seed, self.task.step)
        return IncrementalDataset(self.raw[split], indices, table, self._transform(kind), seed)

    def _set(self, kind: str) -> IncrementalDataset:
        assert kind in self._sets, f"setup('{kind}') comes first, on all ranks"
        return self._sets[kind]

    @property
    def train_set(self) -> IncrementalDataset:
        """Training images of the step, randomly transformed; exemplars are not among them."""
        return self._set("train")

    @property
    def val_set(self) -> IncrementalDataset:
        """Validation images of the step: labels of the new classes."""
        return self._set("val")

    @property
    def test_set(self) -> IncrementalDataset:
        """Test images of the step, every class as its row of the wide confusion matrix."""
        return self._set("test")

    def lists(self) -> dict[str, dict[str, Any]]:
        """Of each set: number of images, hash of the list, whether it is the published one.

        That is None where no list was published. Of "test" also a hash of what all files of the
        validation split hold, by which one knows whether two steps were tested on the same data.
        """
        told: dict[str, dict[str, Any]] = {}
        for kind, dataset in self._sets.items():
            ids, published = dataset.names, has_published(self.task, kind)
            equal = equals_published(ids, self.task, kind) if published else None
            told[kind] = {"images": len(ids), "sha256": list_hash(ids), "published": equal}
        if "test" in told:
            contents = hashlib.sha256(self._contents("val").tobytes()).hexdigest()
            told["test"]["contents"] = contents
        return told

    def candidate_set(self) -> IncrementalDataset:
        """Training images of the step before, with the labels of that step: who may be kept.

        `memory.candidates` says whether they are randomly transformed or whole.
        """
        crop = self.memory_policy["candidates"] == "crop"
        before = replace(self.task, step=self.task.step - 1)
        return IncrementalDataset(
            self.raw["train"],
            self._train_and_held_out(before)[0],
            self._train_table(allowed(before)),
            self._transform("train") if crop else NoTransform(),
            (self.seed, self.task.step, "candidates"),
        )

    def replay(self, exemplars: Mapping[str, int]) -> None:
        """Add exemplars to the training images of the step.

        Under the policy "current" they are masked like every other image of the step; under
        "stored" they show the classes of the step that stored them as well, and under "all_seen"
        every class up to this step.

        Args:
            exemplars: bare image id → step of whose training images it was.

        Raises:
            UserError: an image that the data set's training list does not have, or that has no
                saliency map where they are asked for.
        """
        places = {entry.id: index for index, entry in enumerate(self.raw["train"].entries)}
        missing = [name for name in exemplars if name not in places]
        if missing:
            raise UserError(
                f"the memory list names image {missing[0]}, which is not in the training list of "
                f"{self.raw['train'].root}."
            )
        alike = self.memory_policy["labels"] == "current"
        self.replay_sets, self._replay_origins = [], []
        for origin in [self.task.step] if alike else sorted(set(exemplars.values())):
            names = sorted(name for name, step in exemplars.items() if alike or step == origin)
            indices, may = [places[name] for name in names], self._of_exemplars(origin)
            self._replay_origins.append(origin)
            self.replay_sets.append(
                self._training(indices, may, self.seed, self.task.step, "replay")
            )

    def _of_exemplars(self, origin: int) -> tuple[int, ...]:
        """Label ids that exemplars from a step may show under the policy `memory.labels`."""
        if self.memory_policy["labels"] == "all_seen":
            return self.task.seen
        return *allowed(replace(self.task, step=origin)), *allowed(self.task)

    def leakage(self) -> str:
        """The leakage audit of the step's training images and exemplars, in one line."""
        presence = self._presence("train")

        def part(words: str, images: IncrementalDataset, may: Collection[int], origin: int) -> Part:
            taught = {*allowed(replace(self.task, step=origin)), *allowed(self.task)}
            return Part(words, presence[images.indices], images.table, may, taught)

        parts = [part("images", self.train_set, allowed(self.task), self.task.step)]
        for origin, dataset in zip(self._replay_origins, self.replay_sets, strict=True):
            stored = f", stored at step {origin}" if origin != self.task.step else ""
            words = f"exemplars ({self.memory_policy['labels']} labels{stored})"
            parts.append(part(words, dataset, self._of_exemplars(origin), origin))
        return audit(self.task, parts)

    def names(self, split: str) -> list[str]:
        """Bare image ids of a split, in list order."""
        return [entry.id for entry in self.raw[split].entries]

    def contents(self) -> dict[str, np.ndarray]:
        """What the files of the data set hold, by hash.

        Returns:
            "train" and "val": the tables of the two splits (`contents_table`); "trained": [training
            images] bool, what this step is trained on, exemplars among it.
        """
        trained = np.zeros(len(self.raw["train"]), bool)
        for dataset in (self.train_set, *self.replay_sets):
            trained[dataset.indices] = True
        return {"train": self._contents("train"), "val": self._contents("val"), "trained": trained}

    def _contents(self, split: str) -> np.ndarray:
        if split not in self._tables:
            maps = self.saliency if split == "train" else None
            self._tables[split] = contents_table(self.raw[split], self.cache_dir, maps)
        return self._tables[split]

    def train_hash(self) -> str:
        """SHA-256 of what is trained on: ids and contents of the images, label tables.

        Raises:
            UserError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for dataset in (self.train_set, *self.replay_sets):
            rows = self._contents("train")[dataset.indices]
            for row in np.flatnonzero((rows == UNREADABLE).any(axis=1))[:1]:
                entry = dataset.raw.entries[dataset.indices[row]]
                raise entry.fault(f"the {unreadable(rows, row)} of {entry.id} cannot be read", "")
            digest.update(rows.tobytes())
            digest.update(dataset.table.tobytes())
        return digest.hexdigest()

    def _training(
        self, indices: Sequence[int] | np.ndarray, may: Collection[int], *seed: object
    ) -> IncrementalDataset:
        """Images to train on, with these label ids, randomly transformed, with saliency maps."""
        raw = self.raw["train"]
        if self.saliency is not None:
            self.saliency.check([raw.entries[index] for index in indices])
        table, transform = self._train_table(may), self._transform("train")
        return IncrementalDataset(raw, indices, table, transform, seed, self.saliency)

    def _train_table(self, may: Collection[int]) -> np.ndarray:
        """The table of training labels that shows these label ids."""
        return self.task.label_table(may, self.masking_value("train"))

    def masking_value(self, kind: str) -> int:
        """What the pixels of classes that a set hides count as: 0, background, or 255, nothing."""
        return self.blocks[kind]["args"]["masking_value"]

    def _transform(self, kind: str) -> Transform:
        args = self.blocks[kind]["args"]
        if not args["transform"]:
            return NoTransform()
        crop_size = args["transform_args"]["crop_size"]
        if kind == "train":
            return TrainTransform(crop_size)
        return eval_transform(self.data_set.evaluation, crop_size)

    def _train_and_held_out(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        indices = self._indices(task, "train")
        if not self.blocks["val"]["cross_val"]:
            return indices, indices[:0]
        generator = np.random.default_rng(seed_from(self.seed, "cross_val", task.step))
        order = generator.permutation(len(indices))
        held_out = round(HELD_OUT * len(indices))
        if held_out == 0:
            raise UserError(
                f"data_loader.args.val.cross_val: the step has {len(indices)} training images, too "
                "few to hold a fifth out; set it to false."
            )
        return indices[np.sort(order[held_out:])], indices[np.sort(order[:held_out])]

    def _presence(self, split: str) -> np.ndarray:
        """[images, label ids] bool: which label ids occur in each mask of a split."""
        assert split in self._presences, "setup() comes first, on all ranks"
        return self._presences[split]

    def _without_class(self, split: str) -> str:
        """A warning where masks hold no class, or the training masks not all of the step."""
        presence = self._presence(split)
        absent = [
            label for label in self.task.new if not presence[:, self.task.columns([label])].any()
        ]
        if absent and split == "train":
            return f"no training mask holds {ranges(absent)}{self._void(split, absent)}"
        rows = np.flatnonzero(~presence[:, self.task.columns(self.task.classes)].any(axis=1))
        void = self._void(split, self.task.new, rows)
        return f"{len(rows)} {split} masks hold no class{void}" if void else ""

    def _void(self, split: str, labels: Sequence[int], rows: np.ndarray | None = None) -> str:
        """What void is, where masks hold it and these label ids were most likely meant; else empty.

        Args:
            split: whose masks.
            labels: of classes.
            rows: which masks; default: all.
        """
        rows = np.arange(len(self.raw[split])) if rows is None else rows
        count, looked_at = holding_void(self.raw[split], rows)
        if not count:
            return ""
        return (
            f"; {count} of {looked_at} that were looked at hold {VOID} (in 16 bits {WIDE_VOID}), "
            "which is void, neither trained on nor counted: where it shall be foreground, write "
            f"the label id of its class, such as {labels[0]}"
        )

    def _indices(self, task: Task, kind: str) -> np.ndarray:
        """Images of a step: from the published list when it is there, else by the rule."""
        split = "train" if kind == "train" else "val"
        raw, path = self.raw[split], published_file(task, kind, self.lists_dir)
        if path is not None:
            indices = read_published(path, raw)
            source = f"from {path}"
        else:
            presence = self._presence(split)
            indices = derive(raw, presence, task, kind)
            source = "by the rule"
            if beyond := len(indices) - len(select(presence, task, kind)):
                source += f" and {beyond} more that the published list names"
        if len(indices) == 0 and kind == "val":
            log.warning("no validation image holds a new class: validations will say nothing")
        elif len(indices) == 0:
            labels = task.seen if kind == "test" else task.new
            why = advice = "; choose another task or setting"
            if not presence[:, task.columns(labels)].any():
                why = f": no mask of the {split} list holds {ranges(labels)}"
                why += self._void(split, labels) or advice
            raise UserError(
                f"no image of {raw.root} belongs to the {kind} set of step {task.step} of "
                f"task '{task.name}' ({task.setting}){why}."
            )
        ids = [raw.entries[index].id for index in indices]
        log.info(
            "%s list: %d images %s, sha256 %s…, %s",
            *(kind, len(ids), source, list_hash(ids)[:16]),
            compare_with_published(ids, task, kind),
        )
        return indices

    # --------------------------------------------------------------------------------- loaders
    def check_mix(self) -> None:
        """Raise `UserError` when half of a batch is asked for that has no half."""
        memory = self.memory_policy
        replays = self.task.step > 0 and memory["mem_size"] > 0
        if replays and memory["mix"] == "half_batch" and self.global_batch == 1:
            raise UserError(
                "data_loader.args.memory.mix is 'half_batch', but half of the global batch is "
                f"nothing: {self.batch_words()}; choose a larger one, or 'concat'."
            )

    @cached_property
    def train_batches(self) -> ShuffledBatches:
        """Which images are in which batch of `train_loader`; its `set_epoch` chooses the order.

        Raises:
            UserError: the step has fewer images than one global batch.
        """
        images, exemplars = len(self.train_set), sum(map(len, self.replay_sets))
        mixed = self.memory_policy["mix"] == "half_batch"
        batch_size, world = self.blocks["train"]["batch_size"], self.ranks.world
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
                f"one batch: {self.batch_words()}; choose a smaller one."
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
        return self.blocks["train"]["batch_size"] * self.ranks.world * self.accumulate

    def one_size(self, kind: str) -> bool:
        """Whether all images of "train", "val" or "test" come in one size."""
        whole = kind != "train" and self.data_set.evaluation == "whole"
        return self.blocks[kind]["args"]["transform"] and not whole

    def evaluated(self, kind: str) -> str:
        """How the images of "val" or "test" are evaluated, in words."""
        if not self.blocks[kind]["args"]["transform"] or self.data_set.evaluation == "whole":
            return "whole"
        if self.data_set.evaluation != "crop":
            return "resized to {}×{}".format(*self.data_set.evaluation)
        return f"centre crop {self.blocks[kind]['args']['transform_args']['crop_size']}"

    @property
    def norm_batch(self) -> int:
        """Images that a BatchNorm which is not frozen sees at a time; GPUs synchronise theirs."""
        alone = self.ranks.device.type != "cuda"
        return self.blocks["train"]["batch_size"] * (1 if alone else self.ranks.world)

    def batch_words(self) -> str:
        """How the global batch comes about, for messages."""
        return (
            f"data_loader.args.train.batch_size (--batch_size) "
            f"{self.blocks['train']['batch_size']} × {self.ranks.world} process(es) × "
            f"{self.accumulate} accumulated (trainer.accumulate) = {self.global_batch}"
        )

    def candidate_loader(self) -> DataLoader:
        """The candidates of the replay memory, in order, all on this rank."""
        whole = self.memory_policy["candidates"] == "whole"
        batch_size = 1 if whole else self.blocks["train"]["batch_size"]
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
        """This rank's share of the test images without a class seen yet, which DKD leaves out."""
        kept = self.test_set
        others = np.setdiff1d(np.arange(len(kept.raw)), kept.indices)
        images = IncrementalDataset(kept.raw, others, kept.table, kept.transform, kept.seed)
        return self._share(images, "test")

    def _share(self, dataset: IncrementalDataset, kind: str) -> DataLoader:
        share = OrderedShare(len(dataset), self.ranks.rank, self.ranks.world)
        return self._loader(dataset, sampler=share, batch_size=self.blocks[kind]["batch_size"])

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


def loaders() -> dict[str, Callable[..., IncrementalDataLoader]]:
    """What makes the bundle of a data set, by `data_loader.type`."""
    return {name: partial(IncrementalDataLoader, raw) for name, raw in DATA_SETS.items()}
