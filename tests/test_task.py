"""Schedules, the class groups of a step, and label id ↔ channel."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from base.task import Task, make_task
from data_loader.task_tables import ADE_TASKS, VOC_TASKS
from utils.errors import UserError

ORDERS = json.loads((Path(__file__).parent / "data" / "class_orders.json").read_text())
TABLES = {"voc": VOC_TASKS, "ade": ADE_TASKS}
CLASSES = {"voc": 20, "ade": 150}

# data set, task → number of classes of each step, as published
NATURAL = {
    ("voc", "joint"): [20],
    ("voc", "19-1"): [19, 1],
    ("voc", "15-5"): [15, 5],
    ("voc", "15-1"): [15] + 5 * [1],
    ("voc", "10-1"): [10] + 10 * [1],
    ("voc", "10-5"): [10, 5, 5],
    ("voc", "10-10"): [10, 10],
    ("voc", "5-3"): [5] + 5 * [3],
    ("ade", "joint"): [150],
    ("ade", "100-50"): [100, 50],
    ("ade", "100-10"): [100] + 5 * [10],
    ("ade", "100-5"): [100] + 10 * [5],
    ("ade", "50-50"): [50, 50, 50],
}
SHUFFLED = {("voc", name): [15] + 5 * [1] for name in ORDERS}
SIZES = NATURAL | SHUFFLED


def a_task(dataset: str = "voc", name: str = "15-1", step: int = 0, **changes) -> Task:
    names = ["background", *(f"class {k}" for k in range(1, CLASSES[dataset] + 1))]
    arguments = {"class_names": names, "setting": "overlap", "name": name, "step": step, **changes}
    return make_task(dataset, TABLES[dataset], **arguments)


def all_steps(dataset: str, name: str) -> list[Task]:
    return [a_task(dataset, name, step) for step in range(len(SIZES[dataset, name]))]


def test_the_published_tasks_are_all_there_and_no_others():
    assert {(dataset, name) for dataset in TABLES for name in TABLES[dataset]} == set(SIZES)
    assert list(ORDERS) == [f"15-1_{letter}" for letter in "bcdefghijklmnopqrstuvw"]
    assert {name: VOC_TASKS[name] for name in ORDERS} == ORDERS


@pytest.mark.parametrize(("dataset", "name"), SIZES)
def test_every_schedule_is_a_partition_of_the_classes(dataset, name):
    steps = a_task(dataset, name).steps
    assert [len(ids) for ids in steps] == SIZES[dataset, name]
    order = [label for ids in steps for label in ids]
    every = list(range(1, CLASSES[dataset] + 1))
    assert sorted(order) == every
    assert (order == every) == ((dataset, name) in NATURAL)
    valid = ", ".join(map(str, range(len(steps))))
    with pytest.raises(UserError, match=rf"has the steps {valid}\.$"):
        a_task(dataset, name, len(steps))


@pytest.mark.parametrize(("dataset", "name"), SIZES)
def test_groups_and_channels_of_every_step(dataset, name):
    sizes = SIZES[dataset, name]
    steps = all_steps(dataset, name)
    arrived = ()
    for step, task in enumerate(steps):
        assert (task.old, task.seen) == (arrived, arrived + task.new)
        assert task.new == task.steps[step]
        assert task.classes_per_step == tuple(sizes[: step + 1])
        channels = list(range(1 + sum(sizes)))
        assert channels[task.old_channels] == channels[1 : 1 + sum(sizes[:step])]
        assert channels[task.new_channels] == channels[1:][sum(sizes[:step]) :][: sizes[step]]
        assert list(task.base_channels) == channels[: 1 + sizes[0]]
        assert task.channel_names() == ("background", *(f"class {label}" for label in task.seen))
        assert task.published
        arrived = task.seen
    for before, after in pairwise(steps):
        assert before.new_channels.stop == after.new_channels.start


@pytest.mark.parametrize(("dataset", "name"), SIZES)
def test_label_id_to_channel_and_back(dataset, name):
    for task in all_steps(dataset, name):
        table, seen = task.label_table(task.seen, 255), np.array(task.seen)
        assert table[seen].tolist() == list(range(1, 1 + len(seen)))
        ids = task.label_ids()
        assert ids.dtype == np.uint8
        assert ids.tolist() == [0, *seen]
        assert (ids[table[seen]] == seen).all()
        if (dataset, name) in NATURAL:
            assert (table[seen] == seen).all()


@pytest.mark.parametrize("masked", [0, 255])
@pytest.mark.parametrize("name", ["15-1", "15-1_f"])
def test_hidden_classes_are_masked_and_background_and_void_are_kept(name, masked):
    task = a_task(name=name, step=2)
    table = task.label_table(task.new, masked)
    assert (table.shape, table.dtype) == ((256,), np.uint8)
    (new,) = task.new
    assert (table[0], table[new], table[255]) == (0, 17, 255)
    hidden = [label for label in range(1, 255) if label != new]
    assert (table[hidden] == masked).all()


def test_the_wide_table_gives_every_class_a_row_of_its_own():
    """Seen classes as channels, then later steps, then what never arrives."""
    task = a_task(name="mine", step=1, steps=[[3, 1], [7], [2, 5]])
    others = [label for label in range(1, 21) if label not in (3, 1, 7, 2, 5)]
    assert task.unseen == (2, 5, *others)
    table, rows = task.wide_table(), [0, 3, 1, 7, 2, 5, *others]
    assert table[rows].tolist() == list(range(21))
    assert (table.dtype, table[255]) == (np.uint8, 255)
    assert task.label_ids(unseen=True).tolist() == rows
    assert task.channel_names(unseen=True)[3:6] == ("class 7", "class 2", "class 5")


def test_own_schedule_need_not_name_every_class():
    task = a_task(name="mine", step=1, steps=[[3, 1], [7], [2]])
    assert task.steps == ((3, 1), (7,), (2,))
    assert (task.old, task.new, task.seen) == ((3, 1), (7,), (3, 1, 7))
    assert (task.old_channels, task.new_channels) == (slice(1, 3), slice(3, 4))
    assert task.label_ids().tolist() == [0, 3, 1, 7]
    assert task.label_table([3, 1, 7], 0)[[1, 2, 3, 7]].tolist() == [2, 0, 1, 3]
    assert task.channel_names() == ("background", "class 3", "class 1", "class 7")


@pytest.mark.parametrize("changes", [{"steps": [[1], [2]]}, {"own_classes": True}])
def test_published_lists_apply_to_published_schedules_and_classes_alone(changes):
    assert a_task().published
    assert not a_task(name="15-1", **changes).published


def test_a_task_is_frozen():
    with pytest.raises(FrozenInstanceError):
        a_task().step = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "overlapped"}, "setting.*did you mean 'overlap'.*disjoint, sequential"),
        ({"name": "15_1"}, r"name.*'15_1'.*did you mean '15-1'.*19-1, 15-5, 15-1, .*15-1_w"),
        ({"dataset": "ade"}, "'15-1', which does not exist.*joint, 100-50, 100-10, 100-5, 50-50"),
        ({"step": 6}, "step is 6, but task '15-1' has the steps 0, 1, 2, 3, 4, 5"),
        ({"step": -1}, "step is -1, but task '15-1' has the steps 0, 1, 2, 3, 4, 5"),
        ({"steps": [[1], [2]], "step": 2}, "step is 2, .*steps 0, 1"),
        ({"steps": []}, "steps is empty"),
        ({"steps": [[1], []]}, r"steps\[1\] must be a list of at least one label id"),
        ({"steps": [1, 2]}, r"steps\[0\] must be a list"),
        ({"steps": ["12"]}, r"steps\[0\] must be a list"),
        ({"steps": [[1], [2, "3"]]}, r"steps\[1\] must be a list"),
        ({"steps": [[1.0]]}, r"steps\[0\] must be a list"),
        ({"steps": [[True]]}, r"steps\[0\] must be a list"),
        ({"steps": [[1, 2], [3, 2]]}, "label id 2 more than once"),
        ({"steps": [[4, 1, 4], [1]]}, "label id 1, 4 more than once"),
        ({"steps": [[0, 1]]}, r"label id 0, .*1\.\.20"),
        ({"steps": [[1], [21]]}, r"label id 21, .*1\.\.20"),
        ({"steps": [[1], [-1]]}, r"label id -1, .*1\.\.20"),
        ({"steps": [[255]]}, r"label id 255, .*1\.\.20"),
        ({"class_names": ["background", "cat", "dog"]}, r"label id 3, .*1\.\.2;.*class_names"),
    ],
)
def test_faulty_tasks(changes, message):
    with pytest.raises(UserError, match=message):
        a_task(**changes)


def test_label_0_is_hidden_as_any_class_where_it_is_one():
    names, steps = ("wall", "floor", "roof"), ((0,), (1, 2))
    for background, expected in ((False, [255, 2, 3]), (True, [0, 1, 2])):
        schedule = steps if not background else ((1,), (2,))
        task = Task("own", "own", "overlap", 1, schedule, names, background=background)
        kept = task.new if not background else task.seen
        assert task.label_table(kept, 255)[:3].tolist() == expected


def test_hidden_classes_are_void_of_any_width():
    """255 means void in the config; where 255 is a channel, void is another number."""
    names = tuple(f"class {number}" for number in range(302))
    for first, void in ((3, 255), (300, np.iinfo(np.int32).max)):
        steps = (tuple(range(1, 1 + first)), (301,))
        task = make_task("own", {}, names, name="own", setting="overlap", step=0, steps=steps)
        table = task.label_table(task.new, 255)
        assert table[301] == table[-1] == void
        assert table[: first + 1].tolist() == [*range(first + 1)]
        assert task.label_table(task.new, 0)[301] == 0
