"""What one step of a class-incremental task means: which classes are old, new, seen, hidden.

It is the only place that converts a data set's label id to a channel of the logits and back. It
knows no files and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from utils.errors import UserError, choose, listing
from utils.labels import BACKGROUND, VOID, ranges, void_id

SETTINGS = ("overlap", "disjoint", "sequential")
ClassNames = Sequence[str] | Mapping[int, str]  # by label id: of 0, 1, 2 …, or of any ids


def ids_of(class_names: ClassNames) -> tuple[int, ...]:
    """The label ids that have a name, ascending."""
    if isinstance(class_names, Mapping):
        return tuple(sorted(class_names))
    return tuple(range(len(class_names)))


@dataclass(frozen=True)
class Task:
    """One step of a schedule of classes.

    Channels are in order of arrival: channel 0 is the auxiliary head (and the label background),
    channel k the k-th class that ever arrived. For schedules in natural order, channel = label id.
    Void is the largest number of its type: among label ids 255 or, with 16 bits, 65,535; among
    channels 255 while the classes fit below it.

    Attributes:
        dataset: short name of the data set, for file names.
        name: the schedule, such as "15-1".
        setting: "overlap", "disjoint" or "sequential".
        step: 0 … T.
        steps: label ids of each step, in order of arrival.
        class_names: name of each label id; that of background, if there is one, has the id 0.
        published: schedule and classes are the data set's own, so published lists apply.
        background: whether label id 0 is background; else every pixel is of a class or void, and
            the label 0 of training is what is hidden.
        joint: the steps of the schedule that are learnt at once, as step 0; empty unless this is
            joint training, the upper bound.
    """

    dataset: str
    name: str
    setting: str
    step: int
    steps: tuple[tuple[int, ...], ...]
    class_names: ClassNames
    published: bool = True
    background: bool = True
    joint: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Every label id of the data set but void, ascending: the columns of a presence table."""
        return ids_of(self.class_names)

    @property
    def classes(self) -> tuple[int, ...]:
        """The label ids of classes."""
        return self.ids[1:] if self.background else self.ids

    @property
    def void(self) -> int:
        """The label id of void."""
        return void_id(self.ids)

    def columns(self, labels: Iterable[int]) -> list[int]:
        """Where label ids stand among `ids`."""
        return [self._columns[label] for label in labels]

    @cached_property
    def _columns(self) -> dict[int, int]:
        return {label: column for column, label in enumerate(self.ids)}

    @property
    def old(self) -> tuple[int, ...]:
        """Label ids of the steps before this one."""
        return tuple(label for ids in self.steps[: self.step] for label in ids)

    @property
    def new(self) -> tuple[int, ...]:
        """Label ids that arrive at this step."""
        return self.steps[self.step]

    @property
    def seen(self) -> tuple[int, ...]:
        """Label ids of this step and of all before it, in order of arrival."""
        return self.old + self.new

    @property
    def unseen(self) -> tuple[int, ...]:
        """Label ids of the other classes: in order of arrival, then those that never arrive."""
        later = [label for ids in self.steps[self.step + 1 :] for label in ids]
        known = {*self.seen, *later}
        return (*later, *(label for label in self.classes if label not in known))

    @property
    def classes_per_step(self) -> tuple[int, ...]:
        """Number of classes of each step up to this one."""
        return tuple(len(ids) for ids in self.steps[: self.step + 1])

    @property
    def old_channels(self) -> slice:
        """Channels of the logits that hold the old classes."""
        return slice(1, 1 + len(self.old))

    @property
    def new_channels(self) -> slice:
        """Channels of the logits that hold the new classes."""
        return slice(1 + len(self.old), 1 + len(self.seen))

    @property
    def schedule(self) -> tuple[tuple[int, ...], ...]:
        """Label ids of each step; of joint training, those of the steps that it learns at once."""
        return (*self.joint, *self.steps[1:]) if self.joint else self.steps

    @property
    def schedule_step(self) -> int:
        """The step of the schedule up to which the classes are known."""
        return len(self.joint) - 1 if self.joint else self.step

    @property
    def base_channels(self) -> range:
        """Channels of background, if any, and of the schedule's first step: the group `old`."""
        first, *_ = self.joint or self.steps
        return range(0 if self.background else 1, 1 + len(first))

    @cached_property
    def _channels(self) -> dict[int, int]:
        order = (label for ids in self.steps for label in ids)
        return {label: channel for channel, label in enumerate(order, start=1)}

    def label_table(self, kept: Iterable[int], masked: int) -> np.ndarray:
        """Lookup table from label id to training label.

        Args:
            kept: label ids that stay visible; each becomes its channel.
            masked: what every other label id becomes: 0, or 255 for void.

        Returns:
            [256] or [65,536], by label id. The type of the labels is uint8 while the channels fit
            below its largest number, else int32, which Pillow can crop as well. Background stays 0,
            void becomes the largest number of the type.
        """
        dtype = np.uint8 if len(self.seen) < VOID else np.int32
        void = np.iinfo(dtype).max
        table = np.full(1 + self.void, void if masked == VOID else masked, dtype=dtype)
        if self.background:
            table[BACKGROUND] = BACKGROUND
        table[self.void] = void
        for label in kept:
            table[label] = self._channels[label]
        return table

    def wide_table(self) -> np.ndarray:
        """Lookup table from label id to row of the wide confusion matrix: no class is hidden.

        Rows are the channels, then the classes of `unseen`; else as `label_table`.
        """
        every = (*self.seen, *self.unseen)
        return replace(self, step=0, steps=(every,)).label_table(every, BACKGROUND)

    def label_ids(self, *, unseen: bool = False) -> np.ndarray:
        """Lookup table from channel to label id: [1 + seen classes] uint8 or uint16.

        Background is first, or void where there is none; with `unseen`, those classes are last, as
        in the rows of the wide confusion matrix.
        """
        first = BACKGROUND if self.background else self.void
        ids = (first, *self.seen, *(self.unseen if unseen else ()))
        return np.array(ids, np.uint8 if self.void == VOID else np.uint16)

    def to_ids(self, labels: np.ndarray, *, unseen: bool = False) -> np.ndarray:
        """Channels [H, W], of any type whose largest number is void, as label ids."""
        ids = self.label_ids(unseen=unseen)
        ids = np.append(ids, ids.dtype.type(self.void))
        return ids[np.minimum(labels, len(ids) - 1)]

    def channel_names(self, *, unseen: bool = False) -> tuple[str, ...]:
        """Class name of each entry of `label_ids`, "void" where there is no background."""
        first = self.class_names[BACKGROUND] if self.background else "void"
        labels = (*self.seen, *(self.unseen if unseen else ()))
        return (first, *(self.class_names[label] for label in labels))


def make_task(
    dataset: str,
    tables: Mapping[str, Sequence[Sequence[int]]],
    class_names: ClassNames,
    *,
    name: str,
    setting: str,
    step: int,
    steps: Sequence[Sequence[int]] | None = None,
    joint: bool = False,
    own_classes: bool = False,
    background: bool = True,
) -> Task:
    """Check the `task` block of a config and make the `Task`.

    Args:
        dataset: short name of the data set.
        tables: its published schedules.
        name: of a published schedule, or any name when `steps` is given.
        steps: own schedule.
        joint: learn the classes of all steps up to this one at once.
        own_classes: `class_names` come from the user, so this is another data set.
        background: whether label id 0 is background and no class.

    Raises:
        UserError: an unknown task, setting or step, with the valid ones; a faulty own schedule.
    """
    choose("data_loader.args.task.setting", setting, SETTINGS)
    if steps is None:
        choose("data_loader.args.task.name", name, tables)
        schedule = tuple(tuple(ids) for ids in tables[name])
    else:
        schedule = _own_schedule(steps)
    published = steps is None and not own_classes
    named = class_names if isinstance(class_names, Mapping) else tuple(class_names)
    task = Task(dataset, name, setting, step, schedule, named, published, background)
    classes = set(task.classes)
    outside = [label for ids in schedule for label in ids if label not in classes]
    if outside:
        raise UserError(
            f"task '{name}' names the label id {outside[0]}, but the data set's classes are "
            f"{ranges(classes, '..')}; correct data_loader.args.task.steps or class_names."
        )
    if not 0 <= step < len(schedule):
        raise UserError(
            f"data_loader.args.task.step is {step}, but task '{name}' has the steps "
            f"{listing(range(len(schedule)))}."
        )
    if joint:
        learnt, later = schedule[: step + 1], schedule[step + 1 :]
        known = published and step == 0  # the lists of the schedule's first step
        return replace(task, step=0, steps=(task.seen, *later), joint=learnt, published=known)
    return task


def _own_schedule(steps: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    where = "data_loader.args.task.steps"
    if not steps:
        raise UserError(f"{where} is empty; give a list of label ids for each step, [[1, 2], [3]].")
    for number, ids in enumerate(steps):
        whole = isinstance(ids, Sequence) and not isinstance(ids, str)
        if not whole or not ids or not all(type(label) is int for label in ids):
            raise UserError(f"{where}[{number}] must be a list of at least one label id.")
    times = Counter(label for ids in steps for label in ids)
    twice = sorted(label for label, count in times.items() if count > 1)
    if twice:
        raise UserError(f"{where} names label id {listing(twice)} more than once.")
    return tuple(tuple(ids) for ids in steps)
