"""The image sets of one step: which images, and what their labels show.

Training, held out, validation, test, candidates of the replay memory and its exemplars; the hash of
what is trained on, and the audit of its labels. It knows no batches and no processes of loading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset
from base.task import Task
from data_loader.contents import UNREADABLE, contents_table, unreadable
from data_loader.dataset import IncrementalDataset
from data_loader.leakage import Part, allowed, audit
from data_loader.saliency import SaliencyMaps
from data_loader.splits import (
    compare_with_published,
    derive,
    equals_published,
    has_published,
    hold_out,
    list_hash,
    presence_table,
    published_file,
    read_published,
    select,
    void_hint,
    without_class,
)
from data_loader.transforms import NoTransform, TrainTransform, Transform, eval_transform
from utils.errors import UserError
from utils.labels import ranges
from utils.logger import log
from utils.ranks import Ranks
from utils.seeds import seed_from


class StepSets:
    """The image sets of one step, found by one call of `setup` on all ranks.

    After it, nothing here scans, writes or waits for another rank.
    """

    def __init__(
        self,
        task: Task,
        source: Mapping[str, BaseDataset],
        splits: Mapping[str, Mapping[str, Any]],
        memory: Mapping[str, Any],
        *,
        saliency: SaliencyMaps | None,
        lists_dir: str,
        cache_dir: str | None,
        seed: int,
        ranks: Ranks,
    ):
        """
        Args:
            source: the images on disk, "train" and "val".
            splits: the blocks "train", "val" and "test" of `data_loader.args`.
            memory: the block `data_loader.args.memory`.
            lists_dir: where published lists may lie.
            cache_dir: where the presence of classes is cached; default: `lists_dir`.
            seed: of samples and order.
        """
        self.task, self.source, self.saliency = task, source, saliency
        self.splits, self.memory_policy = dict(splits), memory
        self.lists_dir, self.cache_dir = lists_dir, cache_dir or lists_dir
        self.seed, self.ranks = seed, ranks
        self.evaluation = source["val"].evaluation
        self.replay_sets: list[IncrementalDataset] = []
        self._replay_origins: list[int] = []
        self._presences: dict[str, np.ndarray] = {}
        self._sets: dict[str, IncrementalDataset] = {}
        self._tables: dict[str, np.ndarray] = {}

    def setup(self, *kinds: str) -> None:
        """Find the images of the step: rank 0 scans masks that are not cached, the others wait.

        Args:
            kinds: the sets that are needed: "train" (and the replay's candidates), "val", "test".

        Raises:
            UserError: a faulty list or mask, a set without images, a missing saliency map.
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
                self._presences[split] = presence_table(self.source[split], self.cache_dir)
        self._sets = {kind: self._make(kind) for kind in kinds}
        for split in sorted(splits) if self.ranks.is_main else ():
            if left_out := self.source[split].left_out:
                log.info("%s images: left out of %s", split, left_out)
            presence = self._presences[split]
            if warning := without_class(self.source[split], presence, self.task):
                log.warning("%s", warning)

    def _split(self, kind: str) -> str:
        """The split whose images a set takes."""
        held_out = kind == "val" and self.splits["val"]["cross_val"]
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
        return IncrementalDataset(self.source[split], indices, table, self._transform(kind), seed)

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

    def other_test_set(self) -> IncrementalDataset:
        """Test images without a class seen yet, which DKD leaves out."""
        kept = self.test_set
        others = np.setdiff1d(np.arange(len(kept.source)), kept.indices)
        return IncrementalDataset(kept.source, others, kept.table, kept.transform, kept.seed)

    def candidate_set(self) -> IncrementalDataset:
        """Training images of the step before, with its labels: those that may be kept."""
        crop = self.memory_policy["candidates"] == "crop"
        before = replace(self.task, step=self.task.step - 1)
        return IncrementalDataset(
            self.source["train"],
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
            UserError: an image that is not in the training list, or has no saliency map.
        """
        places = {entry.id: index for index, entry in enumerate(self.source["train"].entries)}
        missing = [name for name in exemplars if name not in places]
        if missing:
            raise UserError(
                f"the memory list names image {missing[0]}, which is not in the training list of "
                f"{self.source['train'].root}."
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

    def _training(
        self, indices: Sequence[int] | np.ndarray, may: Collection[int], *seed: object
    ) -> IncrementalDataset:
        """Images to train on, with these label ids, randomly transformed, with saliency maps."""
        source = self.source["train"]
        if self.saliency is not None:
            self.saliency.check([source.entries[index] for index in indices])
        table, transform = self._train_table(may), self._transform("train")
        return IncrementalDataset(source, indices, table, transform, seed, self.saliency)

    def _train_table(self, may: Collection[int]) -> np.ndarray:
        """The table of training labels that shows these label ids."""
        return self.task.label_table(may, self.masking_value("train"))

    def masking_value(self, kind: str) -> int:
        """What the pixels of classes that a set hides count as: 0, background, or 255, nothing."""
        return self.splits[kind]["args"]["masking_value"]

    def _transform(self, kind: str) -> Transform:
        args = self.splits[kind]["args"]
        if not args["transform"]:
            return NoTransform()
        crop_size = args["transform_args"]["crop_size"]
        if kind == "train":
            return TrainTransform(crop_size)
        return eval_transform(self.evaluation, crop_size)

    def fixed_size(self, kind: str) -> bool:
        """Whether all images of "train", "val" or "test" come in one size."""
        whole = kind != "train" and self.evaluation == "whole"
        return self.splits[kind]["args"]["transform"] and not whole

    def evaluated(self, kind: str) -> str:
        """How the images of "val" or "test" are evaluated, as text."""
        if not self.fixed_size(kind):
            return "whole"
        if self.evaluation != "crop":
            return "resized to {}×{}".format(*self.evaluation)
        return f"centre crop {self.splits[kind]['args']['transform_args']['crop_size']}"

    # ------------------------------------------------------------------------ images of a step
    def _train_and_held_out(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        indices = self._indices(task, "train")
        if not self.splits["val"]["cross_val"]:
            return indices, indices[:0]
        return hold_out(indices, seed_from(self.seed, "cross_val", task.step))

    def _indices(self, task: Task, kind: str) -> np.ndarray:
        """Images of a step: from the published list when it is there, else by the rule."""
        split = "train" if kind == "train" else "val"
        source, path = self.source[split], published_file(task, kind, self.lists_dir)
        if path is not None:
            indices = read_published(path, source)
            origin = f"from {path}"
        else:
            presence = self._presence(split)
            indices = derive(source, presence, task, kind)
            origin = "by the rule"
            if beyond := len(indices) - len(select(presence, task, kind)):
                origin += f" and {beyond} more that the published list names"
        if len(indices) == 0 and kind == "val":
            log.warning("no validation image holds a new class: validations will say nothing")
        elif len(indices) == 0:
            labels = task.seen if kind == "test" else task.new
            why = advice = "; choose another task or setting"
            if not presence[:, task.columns(labels)].any():
                why = f": no mask of the {split} list holds {ranges(labels)}"
                why += void_hint(source, labels) or advice
            raise UserError(
                f"no image of {source.root} belongs to the {kind} set of step {task.step} of "
                f"task '{task.name}' ({task.setting}){why}."
            )
        ids = [source.entries[index].id for index in indices]
        log.info(
            "%s list: %d images %s, sha256 %s…, %s",
            *(kind, len(ids), origin, list_hash(ids)[:16]),
            compare_with_published(ids, task, kind),
        )
        return indices

    def _presence(self, split: str) -> np.ndarray:
        """[images, label ids] bool: which label ids occur in each mask of a split."""
        assert split in self._presences, "setup() comes first, on all ranks"
        return self._presences[split]

    # ------------------------------------------------------------- what is trained and tested on
    def names(self, split: str) -> list[str]:
        """Bare image ids of a split, in list order."""
        return [entry.id for entry in self.source[split].entries]

    def lists(self) -> dict[str, dict[str, Any]]:
        """Of each set: number of images, hash of the list, whether it is the published one.

        That is None where no list was published. "test" also has a hash of all files of the
        validation split, which tells whether two steps were tested on the same data.
        """
        info: dict[str, dict[str, Any]] = {}
        for kind, dataset in self._sets.items():
            ids, published = dataset.names, has_published(self.task, kind)
            equal = equals_published(ids, self.task, kind) if published else None
            info[kind] = {"images": len(ids), "sha256": list_hash(ids), "published": equal}
        if "test" in info:
            contents = hashlib.sha256(self._contents("val").tobytes()).hexdigest()
            info["test"]["contents"] = contents
        return info

    def contents(self) -> dict[str, np.ndarray]:
        """What the files hold: "train" and "val", each a `contents_table`.

        "trained" is [training images] bool: what the step is trained on, exemplars among it.
        """
        trained = np.zeros(len(self.source["train"]), bool)
        for dataset in (self.train_set, *self.replay_sets):
            trained[dataset.indices] = True
        return {"train": self._contents("train"), "val": self._contents("val"), "trained": trained}

    def _contents(self, split: str) -> np.ndarray:
        if split not in self._tables:
            maps = self.saliency if split == "train" else None
            self._tables[split] = contents_table(self.source[split], self.cache_dir, maps)
        return self._tables[split]

    def train_hash(self) -> str:
        """SHA-256 of what is trained on: ids and contents of the images, label tables."""
        digest = hashlib.sha256()
        for dataset in (self.train_set, *self.replay_sets):
            rows = self._contents("train")[dataset.indices]
            for row in np.flatnonzero((rows == UNREADABLE).any(axis=1))[:1]:
                entry = dataset.source.entries[dataset.indices[row]]
                raise entry.fault(f"the {unreadable(rows, row)} of {entry.id} cannot be read", "")
            digest.update(rows.tobytes())
            digest.update(dataset.table.tobytes())
        return digest.hexdigest()

    def leakage(self) -> str:
        """The leakage audit of the step's training images and exemplars, in one line."""
        presence = self._presence("train")

        def part(text: str, images: IncrementalDataset, may: Collection[int], origin: int) -> Part:
            taught = {*allowed(replace(self.task, step=origin)), *allowed(self.task)}
            return Part(text, presence[images.indices], images.table, may, taught)

        parts = [part("images", self.train_set, allowed(self.task), self.task.step)]
        for origin, dataset in zip(self._replay_origins, self.replay_sets, strict=True):
            stored = f", stored at step {origin}" if origin != self.task.step else ""
            text = f"exemplars ({self.memory_policy['labels']} labels{stored})"
            parts.append(part(text, dataset, self._of_exemplars(origin), origin))
        return audit(self.task, parts)
