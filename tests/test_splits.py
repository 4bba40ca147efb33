"""Which images belong to a step: rules, presence table and its cache, published lists."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_dataset import BaseDataset, Entry
from base.task import SETTINGS, Task, make_task
from data_loader import splits
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.splits import (
    compare_with_published,
    derive,
    list_hash,
    list_name,
    presence_table,
    published_extra,
    published_lists,
    read_published,
    select,
)
from data_loader.task_tables import ADE_TASKS, VOC_TASKS
from data_loader.voc import VOC, VOC_CLASSES
from tests.helpers import PROJECT, ade_presence
from utils.errors import UserError
from utils.logger import log
from utils.ranks import Ranks

KINDS = ("train", "val", "test")


def voc_task(name: str = "15-1", setting: str = "overlap", step: int = 0, **changes) -> Task:
    args = {"name": name, "setting": setting, "step": step, **changes}
    return make_task("voc", VOC_TASKS, VOC_CLASSES, **args)


def voc_steps(name: str, setting: str) -> list[Task]:
    return [voc_task(name, setting, step) for step in range(len(VOC_TASKS[name]))]


# ------------------------------------------------------------------------------------------- rules
@pytest.fixture(scope="module")
def voc() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind → ids and presence table [images, 256] of the true VOC masks."""
    stored = np.load(PROJECT / "tests" / "data" / "voc_presence.npz", allow_pickle=False)
    tables = {}
    for split in ("train", "val"):
        table = np.zeros((len(stored[f"{split}_ids"]), 256), bool)
        table[:, :21] = np.unpackbits(stored[split], axis=1)[:, :21]
        table[:, 255] = stored[f"{split}255"]
        tables[split] = stored[f"{split}_ids"], table
    return {**tables, "test": tables["val"]}


def chosen(voc, task: Task, kind: str) -> list[str]:
    ids, presence = voc[kind]
    return ids[select(presence, task, kind)].tolist()


def test_the_rules_give_all_published_voc_lists(voc):
    published = {k: v for k, v in published_lists().items() if k.startswith("voc/")}
    derived = {}
    for setting in SETTINGS:
        for name in VOC_TASKS:
            for task in voc_steps(name, setting):
                for kind in KINDS:
                    key = f"voc/{list_name(task, kind)}"
                    if key in published:
                        ids = chosen(voc, task, kind)
                        derived[key] = {"count": len(ids), "sha256": list_hash(ids)}
    assert len(derived) == 111
    assert derived == published


def ade_set(ids: list[str]) -> SimpleNamespace:
    return SimpleNamespace(entries=[Entry(name, name, Path(), Path(), "") for name in ids])


def ade_task(name: str, step: int) -> Task:
    names = [str(label) for label in range(151)]
    return make_task("ade", ADE_TASKS, names, name=name, setting="overlap", step=step)


@pytest.mark.slow
def test_the_rules_and_18_images_give_all_published_ade_lists():
    """With the 111 of VOC these are all 180."""
    published = {k: v for k, v in published_lists().items() if k.startswith("ade/")}
    assert len(published) + 111 == len(published_lists()) == 180
    tables = ade_presence()
    beyond = {}
    for key in published:
        name, kind, step = key.removeprefix("ade/overlap_").split("_")
        name = "joint" if name == "offline" else name
        ids, presence = tables["train" if kind == "train" else "val"]
        task = ade_task(name, int(step))
        indices = derive(ade_set(ids), presence, task, kind)
        chosen = [ids[index] for index in indices]
        assert {"count": len(chosen), "sha256": list_hash(chosen)} == published[key], key
        if more := len(chosen) - len(select(presence, task, kind)):
            beyond[key] = more
    assert beyond == {"ade/overlap_100-50_train_00": 18}


def test_images_beyond_the_rule_belong_to_the_complete_data_alone():
    ids, presence = ade_presence()["train"]
    extra = set(published_extra()["ade/overlap_100-50_train_00"])
    task, dataset = ade_task("100-50", 0), ade_set(ids)
    by_rule = select(presence, task, "train").tolist()
    assert not presence[[ids.index(name) for name in extra], 1:101].any()
    assert extra.isdisjoint(ids[index] for index in by_rule)
    other = replace(task, published=False)  # own classes or an own schedule
    assert derive(dataset, presence, other, "train").tolist() == by_rule
    without = ade_set(ids[:-1])
    assert derive(without, presence[:-1], task, "train").tolist() == by_rule[:-1]
    for name in ("100-10", "100-5"):
        assert derive(dataset, presence, ade_task(name, 0), "train").tolist() == by_rule


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("overlap", [9568, 487, 299, 491, 500, 548]),
        ("disjoint", [8437, 378, 299, 420, 500, 548]),
        ("sequential", [8437, 378, 299, 420, 500, 548]),
    ],
)
def test_sizes_of_the_training_lists_of_15_1(voc, setting, counts):
    assert [len(chosen(voc, task, "train")) for task in voc_steps("15-1", setting)] == counts


@pytest.mark.parametrize("name", VOC_TASKS)
def test_sequential_takes_the_images_of_disjoint(voc, name):
    steps = zip(voc_steps(name, "sequential"), voc_steps(name, "disjoint"), strict=True)
    for sequential, disjoint in steps:
        for kind in KINDS:
            assert chosen(voc, sequential, kind) == chosen(voc, disjoint, kind)


def test_rules_on_a_table_that_can_be_checked_by_eye():
    images = [{1}, {1, 3, 255}, {2}, {0, 2, 4}, {0, 255}, {3, 1, 2}]
    presence = np.zeros((len(images), 256), bool)
    for row, ids in enumerate(images):
        presence[row, list(ids)] = True
    steps = [[3, 1], [2], [4]]
    expected = {  # step → train of overlap, train of disjoint, val, test
        0: ([0, 1, 5], [0, 1], [0, 1, 5], [0, 1, 5]),
        1: ([2, 3, 5], [2, 5], [2, 3, 5], [0, 1, 2, 3, 5]),
        2: ([3], [3], [3], [0, 1, 2, 3, 5]),
    }
    for step, (overlap, disjoint, val, test) in expected.items():
        lists = {"overlap": overlap, "disjoint": disjoint, "sequential": disjoint}
        for setting, train in lists.items():
            task = voc_task("mine", setting, step, steps=steps)
            assert [select(presence, task, kind).tolist() for kind in KINDS] == [train, val, test]


def test_comparison_with_the_published_list(voc):
    ids = chosen(voc, voc_task(step=1), "train")
    for other, phrase in [
        (ids, "equal to the published list"),
        (ids[:-1], "NOT the published list (487 images)"),
        (ids[::-1], "NOT the published list (487 images)"),
    ]:
        assert compare_with_published(other, voc_task(step=1), "train") == phrase
    assert compare_with_published(ids, voc_task(step=1), "val").startswith("NOT")
    for task in [
        voc_task(setting="sequential", step=1),
        voc_task("joint"),
        voc_task("15-1_b", step=1),
        voc_task(step=1, own_classes=True),
        voc_task(step=1, steps=VOC_TASKS["15-1"]),
    ]:
        assert compare_with_published(ids, task, "train") == "no published list"


# ------------------------------------------------------------------------------------------- table
@pytest.fixture
def toy(toy_root, tmp_path) -> VOC:
    """The training images of a toy data set that a test may damage."""
    shutil.copytree(toy_root, tmp_path / "toy")
    return VOC("train", str(tmp_path / "toy"))


def expected_table(dataset: VOC) -> np.ndarray:
    table = np.zeros((len(dataset), 256), bool)
    for row, entry in enumerate(dataset.entries):
        table[row, np.unique(np.asarray(Image.open(entry.mask)))] = True
    return table[:, :21]


@pytest.fixture
def no_reading(monkeypatch):
    """Call it, and from then on reading a mask is an error."""

    def refuse(dataset, entry):
        raise AssertionError("a mask was read")

    return lambda: monkeypatch.setattr(BaseDataset, "read_mask", refuse)


@pytest.fixture
def logged(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


@pytest.fixture
def small_chunks(monkeypatch) -> set[int]:
    """Many small jobs for three threads; returns the threads that have read a mask."""
    seen: set[int] = set()
    read = BaseDataset.load_ids

    def load_ids(dataset: BaseDataset, index: int) -> list[int]:
        seen.add(threading.get_ident())
        time.sleep(1e-3)  # lets the others have a job, too
        return read(dataset, index)

    monkeypatch.setattr(splits, "CHUNK", 5)
    monkeypatch.setattr(splits, "cores", lambda: 3)
    monkeypatch.setattr(BaseDataset, "load_ids", load_ids)
    return seen


def save_mask(path: Path, ids: list[int]) -> None:
    Image.fromarray(np.resize(np.array(ids, np.uint8), (48, 64))).save(path)


def test_the_table_is_read_once(toy, tmp_path, no_reading):
    expected = expected_table(toy)
    table = presence_table(toy, tmp_path / "cache" / "new")
    assert (table.dtype, table.shape) == (bool, (48, 21))
    assert (table == expected).all()
    no_reading()
    assert (presence_table(toy, tmp_path / "cache" / "new") == expected).all()
    with pytest.raises(AssertionError, match="a mask was read"):
        presence_table(toy, tmp_path / "elsewhere")


def test_each_split_has_its_own_table(toy, tmp_path):
    val = VOC("val", str(toy.root))
    for dataset in (toy, val, toy, val):
        assert (presence_table(dataset, tmp_path) == expected_table(dataset)).all()


def _another_mask(dataset: VOC) -> None:
    save_mask(dataset.entries[7].mask, [0, 20, 255])


def _another_time(dataset: VOC) -> None:
    os.utime(dataset.entries[7].mask, ns=(1, 1))


def _another_name(dataset: VOC) -> None:
    """As another line of the list; size and time of the mask stay."""
    entry = dataset.entries[7]
    mask = entry.mask.rename(entry.mask.with_name("other.png"))
    dataset.entries[7] = replace(entry, line=entry.line.replace(entry.id, "other"), mask=mask)


@pytest.mark.parametrize("change", [_another_mask, _another_time, _another_name])
def test_changed_data_are_scanned_anew(toy, tmp_path, no_reading, change):
    presence_table(toy, tmp_path)
    change(toy)
    assert (presence_table(toy, tmp_path) == expected_table(toy)).all()
    assert len(list(tmp_path.glob("presence_voc_train_*.npz"))) == 2
    os.utime(toy.entries[8].mask, ns=(1, 1))
    no_reading()
    with pytest.raises(AssertionError, match="a mask was read"):
        presence_table(toy, tmp_path)


def _stored(**arrays):
    def write(path: Path, dataset: VOC) -> None:
        with np.load(path) as cache:
            good = dict(cache)
        np.savez(path, **{**good, **arrays})

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: path.write_bytes(path.read_bytes()[:-100]),
        lambda path, _: path.write_bytes(b"no archive"),
        lambda path, _: path.write_bytes(b""),
        lambda path, _: np.savez(path, something=np.zeros(3)),
        _stored(key=np.array("the key of other data")),
        _stored(presence=np.zeros((47, 3), np.uint8)),
        _stored(presence=np.zeros((48, 3), np.int64)),
        _stored(presence=np.array([{"an": "object"}])),
    ],
    ids=["truncated", "text", "empty", "foreign", "key", "rows", "type", "pickle"],
)
def test_a_damaged_cache_is_replaced(toy, tmp_path, no_reading, logged, damage):
    expected = presence_table(toy, tmp_path)
    assert not logged.records
    (cache,) = tmp_path.glob("presence_voc_train_*.npz")
    damage(cache, toy)
    assert (presence_table(toy, tmp_path) == expected).all()
    assert f"{cache} is damaged" in logged.text
    no_reading()
    assert (presence_table(toy, tmp_path) == expected).all()


def test_a_cache_that_cannot_be_written_is_a_warning(toy, tmp_path, logged):
    blocked = tmp_path / "file"
    blocked.touch()
    assert (presence_table(toy, blocked / "cache") == expected_table(toy)).all()
    (record,) = logged.records
    assert record.levelno == logging.WARNING
    assert "cannot be written" in record.getMessage()


def test_the_parallel_scan_gives_the_same_table(toy, tmp_path, small_chunks):
    assert (presence_table(toy, tmp_path) == expected_table(toy)).all()
    assert len(small_chunks) == 3


@pytest.mark.parametrize("parallel", [False, True])
def test_the_scan_names_a_mask_with_a_wrong_id(toy, tmp_path, request, parallel):
    if parallel:
        request.getfixturevalue("small_chunks")
    mask = toy.entries[33].mask
    save_mask(mask, [0, 3, 21])
    with pytest.raises(UserError, match=rf"train_aug.txt, line 34: mask {mask} .* label id 21;"):
        presence_table(toy, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_the_scan_names_a_missing_mask(toy, tmp_path):
    mask = toy.entries[33].mask
    mask.unlink()
    with pytest.raises(UserError, match=f"train_aug.txt, line 34: mask {mask} does not exist"):
        presence_table(toy, tmp_path)


# ---------------------------------------------------------------------------------- published lists
class CountedRanks(Ranks):
    """One process that counts how often it would wait for others."""

    waits = 0

    def barrier(self) -> None:
        CountedRanks.waits += 1


def loaders(root: Path, lists_dir: Path, **changes) -> IncrementalDataLoader:
    """The bundle of the shipped config for overlap 15-1, step 0."""
    config = json.loads((PROJECT / "configs" / "config_voc.json").read_text(encoding="utf-8"))
    args = {**config["data_loader"]["args"], "num_workers": 0, "data_dir": str(root)}
    args["class_names"] = changes.pop("class_names", None)
    args["task"] |= {"idxs_path": str(lists_dir), **changes}
    ranks = CountedRanks(0, 1, torch.device("cpu"))
    return IncrementalDataLoader(VOC, **args, ranks=ranks)


def publish(lists_dir: Path, kind: str, names: list[str]) -> Path:
    path = lists_dir / "voc" / f"overlap_15-1_{kind}_00.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.array(names))
    return path


@pytest.mark.parametrize("text", ["line", "id"])
def test_published_lists_are_used_as_they_are(toy_root, tmp_path, no_reading, logged, text):
    entries = {split: VOC(split, str(toy_root)).entries for split in ("train", "val")}
    lists = {"train": entries["train"][30:10:-3], "val": entries["val"][:3]}
    lists["test"] = entries["val"][5:1:-1]
    for kind, some in lists.items():
        publish(tmp_path, kind, [getattr(entry, text) for entry in some])
    presence_table(VOC("train", str(toy_root)), tmp_path)  # the leakage audit needs it
    no_reading()
    bundle = loaders(toy_root, tmp_path)
    bundle.setup(*lists)
    for kind, some in lists.items():
        names = [entry.id for entry in some]
        assert getattr(bundle, f"{kind}_set").names == names
        path = tmp_path / "voc" / f"overlap_15-1_{kind}_00.npy"
        assert f"{kind} list: {len(names)} images from {path}" in logged.text


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [[*range(1, 16)], [16]]},
        {"class_names": ["background", *(f"class {k}" for k in range(1, 21))]},
        {"setting": "disjoint"},
        {"name": "15-5"},
    ],
    ids=["own schedule", "own classes", "other setting", "other task"],
)
def test_published_lists_of_something_else_are_not_used(toy_root, tmp_path, changes):
    raw = VOC("train", str(toy_root))
    publish(tmp_path, "train", [raw.entries[0].line])
    bundle = loaders(toy_root, tmp_path, **changes)
    bundle.setup("train")
    assert bundle.train_set.indices.tolist() == list(
        select(expected_table(raw), bundle.task, "train")
    )
    assert len(bundle.train_set) > 1


def test_a_published_name_that_the_data_set_lacks(toy_root, tmp_path):
    raw = VOC("train", str(toy_root))
    path = publish(tmp_path, "train", [raw.entries[0].line, raw.entries[1].line, "2007_000032"])
    message = rf"{path}, entry 2: '2007_000032' is not in the data set's train list"
    with pytest.raises(UserError, match=message):
        loaders(toy_root, tmp_path).setup("train")


def test_one_call_on_all_ranks_sets_up_and_nothing_else_waits(toy_root, tmp_path, no_reading):
    bundle = loaders(toy_root, tmp_path, name="15-5", step=1)
    waits = CountedRanks.waits
    for ask in (
        lambda: bundle.train_set,
        lambda: bundle.val_loader,
        lambda: bundle.test_loader,
        bundle.candidate_set,
        bundle.leakage,
        bundle.train_hash,
    ):
        with pytest.raises(AssertionError, match="comes first, on all ranks"):
            ask()
    bundle.setup("train", "val", "test")
    assert CountedRanks.waits == waits + 1
    no_reading()
    assert min(len(bundle.train_set), len(bundle.val_set), len(bundle.test_set)) > 1
    assert len(bundle.candidate_loader()) > 1
    assert bundle.leakage()
    assert len(bundle.train_hash()) == 64
    assert CountedRanks.waits == waits + 1


def test_evaluation_scans_no_training_mask(toy_root, tmp_path):
    bundle = loaders(toy_root, tmp_path)
    bundle.setup("test")
    assert len(bundle.test_set) > 1
    (cache,) = tmp_path.iterdir()
    assert cache.name.startswith("presence_voc_val_")
    with pytest.raises(AssertionError, match=r"setup\('train'\) comes first"):
        _ = bundle.train_set


# Left out: a zip archive named .npy and a broken header, which read_published lets through as
# AttributeError, BadZipFile and TokenError.
@pytest.mark.parametrize(
    "write",
    [
        lambda path, name: np.save(path, np.array([name], dtype=object), allow_pickle=True),
        lambda path, name: path.write_bytes(path.read_bytes()[:-2]),
        lambda path, name: path.write_text(name),
        lambda path, name: path.write_bytes(b""),
        lambda path, name: np.save(path, np.array([[name]])),
        lambda path, name: np.save(path, np.array([name.encode()])),
        lambda path, name: np.save(path, np.array([0])),
        lambda path, name: np.save(path, np.array([], dtype="U11")),
        lambda path, name: np.save(path, np.array([name, name])),
        lambda path, name: np.savez(path.open("wb"), np.array([name])),
        lambda path, name: path.write_text("PK\x03\x04 is how an archive starts"),
    ],
    ids=[
        *("pickled", "truncated", "text", "empty", "2-d", "bytes", "numbers", "no entry"),
        *("an image twice", "an archive", "a broken archive"),
    ],
)
def test_faulty_published_files(toy_root, tmp_path, write):
    raw = VOC("train", str(toy_root))
    path = publish(tmp_path, "train", [raw.entries[0].id])
    assert read_published(path, raw).tolist() == [0]
    write(path, raw.entries[0].id)
    with pytest.raises(UserError, match=f"image list {path} "):
        read_published(path, raw)
