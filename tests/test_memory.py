"""Memory replay: choice of exemplars, their file, pseudo-labels, label policies, leakage audit."""

from __future__ import annotations

import json
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_model import ModelOutput
from base.batch import Batch
from base.task import Task
from data_loader import exemplars
from data_loader.dataset import ShuffledBatches
from data_loader.exemplars import Candidate
from data_loader.leakage import Part, audit
from scripts.toy_data.shapes import CLASS_NAMES
from tests.helpers import train, write_config
from trainer.build import build_data
from trainer.methods import METHODS
from trainer.replay import find_candidates, pseudo_label
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.labels import ranges
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.ranks import SINGLE, Ranks

SETTINGS = ("overlap", "disjoint", "sequential")
STEPS = [[1, 2], [3], [4], [5]]


# ------------------------------------------------------------------------------------- the choice
def candidates(**ids):
    return [Candidate(name, tuple(labels)) for name, labels in ids.items()]


def test_classes_take_turns():
    """Every class gets its share, however common the others are."""
    many = [Candidate(f"a{i}", (1,)) for i in range(50)]
    few = [Candidate(f"b{i}", (2,)) for i in range(5)]
    taken = exemplars.choose(many + few, (1, 2), 8, seed=3)
    assert {label: len(chosen) for label, chosen in taken.items()} == {1: 4, 2: 4}
    assert all(label in c.ids for label, chosen in taken.items() for c in chosen)


def test_no_image_is_taken_twice():
    both = [Candidate(f"{i}", (1, 2, 3)) for i in range(9)]
    taken = exemplars.choose(both, (1, 2, 3), 7, seed=0)
    names = [c.name for chosen in taken.values() for c in chosen]
    assert len(names) == len(set(names)) == 7
    assert sorted(map(len, taken.values())) == [2, 2, 3]


def test_the_choice_ends_when_nothing_is_left():
    """The published code spins for ever here."""
    taken = exemplars.choose(candidates(a=[1], b=[1, 2]), (1, 2, 3), 10, seed=1)
    assert sorted(c.name for chosen in taken.values() for c in chosen) == ["a", "b"]
    assert taken[3] == []


def test_the_choice_equals_the_rule_written_out():
    """Shuffle both, go round the classes, take the first remaining candidate with the class."""
    generator = np.random.default_rng(5)
    pool = [
        Candidate(f"{i:03d}", tuple(np.flatnonzero(generator.random(9) < 0.2).tolist()))
        for i in range(120)
    ]
    for size, seed in ((1, 0), (37, 1), (90, 2), (500, 3)):
        rule = random.Random(seed)
        rest, classes = list(pool), list(range(1, 9))
        rule.shuffle(rest)
        rule.shuffle(classes)
        expected: list[str] = []
        while len(expected) < size:
            before = len(expected)
            for label in classes:
                found = next((c for c in rest if label in c.ids), None)
                if found is not None and len(expected) < size:
                    rest.remove(found)
                    expected.append(found.name)
            if len(expected) == before:
                break
        taken = exemplars.choose(pool, range(1, 9), size, seed)
        assert sorted(c.name for t in taken.values() for c in t) == sorted(expected)


def test_an_image_that_is_stored_and_fresh_is_one_candidate():
    merged = exemplars.merge(candidates(a=[1], b=[2]), candidates(b=[4], c=[5]))
    assert merged == candidates(a=[1], b=[2, 4], c=[5])


# --------------------------------------------------------------------------------------- the file
def voc_line(name):
    return f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png"


@pytest.mark.parametrize("published", [voc_line, str], ids=["whole lines", "bare ids"])
def test_file_has_the_published_form(tmp_path, published):
    path, lines = tmp_path / "memory.json", {name: published(name) for name in "abc"}
    exemplars.write(path, 1, candidates(b=[2], a=[1, 2]), {}, lines)
    exemplars.write(path, 2, candidates(c=[3], a=[1]), exemplars.read(path), lines)
    a, b, c = lines.values()
    assert json.loads(path.read_text()) == {
        "step_2": {"memory_candidates": [[c, [3]], [a, [1]]], "memory_list": [a, c]},
        "step_1": {"memory_candidates": [[b, [2]], [a, [1, 2]]], "memory_list": [a, b]},
    }
    stored = exemplars.read(path)
    assert exemplars.stored(stored, 1) == candidates(b=[2], a=[1, 2])
    assert exemplars.stored(stored, 3) == []
    assert exemplars.origins(stored, 2) == {"c": 1, "a": 0}


def test_files_with_either_kind_of_name(tmp_path):
    """Of the published code (whole lines, void among the ids) after one of ours with bare ids."""
    path, a, b = tmp_path / "memory.json", voc_line("a"), voc_line("b")
    entries = {
        "step_2": {"memory_candidates": [[b, [0, 3, 255]], [a, [1]]], "memory_list": [a, b]},
        "step_1": {"memory_candidates": [["a", [1]]], "memory_list": ["a"]},
    }
    path.write_text(json.dumps(entries))
    stored = exemplars.read(path, (1, 2, 3))
    assert exemplars.stored(stored, 2) == candidates(b=[3], a=[1])
    assert exemplars.origins(stored, 2) == {"b": 1, "a": 0}
    exemplars.write(path, 3, [], stored, {"a": a, "b": b})  # what comes after is of one kind
    assert json.loads(path.read_text())["step_1"]["memory_list"] == [a]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"step_1": []}',
        '{"step_1": {"memory_list": []}}',
        '{"step_1": {"memory_candidates": [["a"]], "memory_list": ["a"]}}',
        '{"step_1": {"memory_candidates": [["a", ["1"]]], "memory_list": ["a"]}}',
        '{"step_1": {"memory_candidates": [["a", [1]]], "memory_list": ["b"]}}',
        "[" * 100000,
    ],
)
def test_faulty_files(tmp_path, text):
    path = tmp_path / "memory.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"memory list .*memory\.json"):
        exemplars.read(path)
    with pytest.raises(UserError, match="does not exist"):
        exemplars.read(tmp_path / "nowhere.json")


# ---------------------------------------------------------------------------------- pseudo-labels
def test_confident_background_takes_the_class_of_the_old_model():
    """σ ≥ 0.9 on background only; labels and void stay."""
    method = METHODS["dkd"](Task("voc", "own", "overlap", 1, ((1, 2), (3,)), tuple("0123")), {})
    logits = torch.full((1, 3, 2, 2), -9.0)
    logits[0, 0] = 9  # the auxiliary head
    logits[0, 1, 0, 0], logits[0, 2, 0, 1] = 2.1, 2.3  # σ = 0.891, 0.909
    logits[0, 1, 1, 0] = logits[0, 2, 1, 1] = 9.0
    labels = torch.tensor([[[0, 0], [7, 255]]], dtype=torch.uint8)
    filled = pseudo_label(*method.confident(ModelOutput(logits), (2, 2)), labels, 0.9)
    assert filled.dtype == labels.dtype
    assert filled.tolist() == [[[0, 2], [7, 255]]]


def test_a_score_of_just_the_least_is_sure():
    labels, channels = torch.zeros(1, 1, 3, dtype=torch.uint8), torch.full((1, 1, 3), 2)
    scores = torch.tensor([[[0.5, 0.75, 0.8]]])
    assert pseudo_label(channels, scores, labels, 0.75).tolist() == [[[0, 2, 2]]]


def test_the_method_says_how_sure_the_old_model_must_be(every_id, tmp_path):
    """It gets the outputs that it wants, with the logits of old channels alone."""
    data = own_data(every_id, tmp_path, step=2, setting="overlap", candidates="whole")
    found = {}
    for least in (0.7, 0.9):

        class Unsure(METHODS["finetune"]):
            replay_confidence = least
            wants = frozenset({"unknown"})

            def confident(self, output, size):
                assert output.logits.shape[1] == 4
                assert output.unknown is not None
                channels, scores = super().confident(output, size)
                return channels, torch.full_like(scores, 0.8)

        model = _Sure(5, 2)
        found[least] = {
            candidate.ids
            for candidate in find_candidates(
                data.candidate_loader(), Unsure(data.task, {}), model, SINGLE.device
            )
        }
    assert found == {0.7: {(2, 3)}, 0.9: {(3,)}}


def dkd(data):
    return METHODS["dkd"](data.task, {})


class _Sure(torch.nn.Module):
    """A model that is sure of one channel everywhere."""

    def __init__(self, channels, sure):
        super().__init__()
        self.channels, self.sure = channels, sure

    def forward(self, images, wants):
        logits = torch.full((len(images), self.channels, 4, 4), -9.0)
        logits[:, self.sure] = 9.0
        return ModelOutput(logits, unknown=torch.zeros(len(images), 1, 4, 4))


POLICY = ("labels", "candidates", "mix", "mem_size")


def own_data(root, tmp_path, ranks=SINGLE, **task):
    """The bundle of a step of `STEPS` on a data set of five classes."""
    policy = {key: task.pop(key) for key in POLICY if key in task}
    config = write_config(tmp_path / "own.json", root, name="own", steps=STEPS, **task)
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"]["memory"] = policy
    config.write_text(json.dumps(tree))
    data = build_data(
        ConfigParser.from_args("train", "configs/config_voc.json", argv=["-c", str(config)]), ranks
    )
    data.setup("train", "val", "test")
    return data


@pytest.fixture(scope="module")
def every_id(tmp_path_factory):
    """A tree whose images hold the classes that their names say, each in a column of its own."""
    root = tmp_path_factory.mktemp("every_id") / "voc"
    sets = ["1", "2", "12", "13", "23", "123", "14", "34", "1234", "15", "345", "12345", "5", "4"]
    lists = root / "ImageSets/Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClass"):
        folder.mkdir(parents=True)
    (root / "SegmentationClassAug").symlink_to("SegmentationClass")
    for name in sets:
        mask = np.zeros((20, 20), dtype=np.uint8)
        for label in map(int, name):
            mask[2 : 16 + label % 2, 4 * label - 4 : 4 * label] = label
        mask[18:] = 255
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
        Image.fromarray(np.stack([mask * 40] * 3, axis=-1)).save(root / f"JPEGImages/{name}.jpg")
    for split in ("train_aug", "val"):
        (lists / f"{split}.txt").write_text("\n".join(sets))
    return root


def whole_ids(data, dataset):
    """Image id → original label ids that its sample shows as classes, without any crop."""
    shown = {}
    back = {channel: label for label, channel in data.task._channels.items()}
    for index in dataset.indices:
        labels = dataset.table[dataset.source.load_mask(index)]
        shown[dataset.source.entries[index].id] = {
            back[channel] for channel in np.unique(labels).tolist() if channel not in (0, 255)
        }
    return shown


def test_candidates_carry_the_labels_of_the_step_before(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=2, setting="overlap", candidates="whole")
    model = _Sure(4, 2)  # sure of class 2 wherever the masks of step 1, which name 3, are silent
    found = find_candidates(data.candidate_loader(), dkd(data), model, SINGLE.device)
    assert {c.name: c.ids for c in found} == dict.fromkeys(
        ("13", "23", "123", "34", "1234", "345", "12345"), (2, 3)
    )
    first = own_data(every_id, tmp_path, step=1, setting="overlap", candidates="whole")
    found = find_candidates(first.candidate_loader(), dkd(first), model, SINGLE.device)
    assert {c.name: c.ids for c in found} == {
        name: tuple(int(c) for c in name if c in "12")
        for name in ("1", "2", "12", "13", "23", "123", "14", "1234", "15", "12345")
    }, "step 1 has no pseudo-labels"


def test_crops_may_miss_classes_and_whole_masks_may_not(toy_root, tmp_path):
    found = {}
    for how in ("crop", "whole"):
        config = write_config(tmp_path / "c.json", toy_root, name="15-5", step=1)
        tree = json.loads(config.read_text())
        tree["data_loader"]["args"]["memory"] = {"candidates": how}
        config.write_text(json.dumps(tree))
        parsed = ConfigParser.from_args(
            "train", "configs/config_voc.json", argv=["-c", str(config)]
        )
        data = build_data(parsed, SINGLE)
        data.setup("train")
        found[how] = {
            c.name: set(c.ids)
            for c in find_candidates(
                data.candidate_loader(), dkd(data), torch.nn.Identity(), SINGLE.device
            )
        }
    assert found["crop"].keys() == found["whole"].keys()
    assert all(found["crop"][name] <= found["whole"][name] for name in found["whole"])
    assert any(found["crop"][name] < found["whole"][name] for name in found["whole"])


# ------------------------------------------------------------------------------- leakage audit
def allowed_ids(setting, step):
    seen = {label for ids in STEPS[: step + 1] for label in ids}
    return seen if setting == "sequential" else set(STEPS[step])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_audit_of_the_images_of_a_step(every_id, tmp_path, setting, step):
    """Which original label ids reach the loss: those of the step, in `sequential` all seen."""
    data = own_data(every_id, tmp_path, step=step, setting=setting)
    shown = whole_ids(data, data.train_set)
    may = allowed_ids(setting, step)
    assert set().union(*shown.values()) == may
    for name, labels in shown.items():
        assert labels == {int(c) for c in name} & may
        if setting != "overlap":
            assert max(map(int, name)) <= max(STEPS[step]), "no image with a future class"
    assert f"{len(shown)} images show {ranges(may)}" in data.leakage()


@pytest.mark.parametrize("policy", ["current", "stored", "all_seen"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_audit_of_the_exemplars(every_id, tmp_path, setting, policy, step):
    """The same for replayed images, under every label policy."""
    data = own_data(every_id, tmp_path, step=step, setting=setting, labels=policy)
    ids = ["1", "12", "123", "1234", "12345", "13", "345", "4", "2"]
    origins = {name: number % step for number, name in enumerate(ids)}
    data.replay(origins)
    shown = {}
    for dataset in data.replay_sets:
        shown |= whole_ids(data, dataset)
    for name in ids:
        visible = allowed_ids(setting, step)  # new classes are taught, not hidden
        if policy == "stored":
            visible |= allowed_ids(setting, origins[name])
        elif policy == "all_seen":
            visible = {label for ids in STEPS[: step + 1] for label in ids}
        assert shown[name] == {int(c) for c in name} & visible, name
        future = {label for later in STEPS[step + 1 :] for label in later}
        assert not shown[name] & future
    line = data.leakage()
    assert line.count("exemplars") == (1 if policy == "current" else len(set(origins.values())))
    assert "\n" not in line


def told_of(data, origin):
    """What the audit says about the exemplars of a step."""
    (part,) = (p for p in data.leakage().split(" | ") if f"stored at step {origin})" in p)
    return part


def test_audit_tells_what_all_seen_lets_through(every_id, tmp_path):
    """At step 2 (1, 2 | 3 | 4): what "stored" hides, and in how many images."""
    data = own_data(every_id, tmp_path, step=2, setting="overlap", labels="all_seen")
    data.replay({"123": 0, "13": 0, "14": 0, "1": 0, "34": 1, "12345": 1, "23": 1})
    assert told_of(data, 0) == (
        "4 exemplars (all_seen labels, stored at step 0) show 1-4, of which 3 WERE NOT LABELLED "
        "when stored, in 2 images"
    )
    assert told_of(data, 1) == (
        "3 exemplars (all_seen labels, stored at step 1) show 1-4, of which 1-2 WERE NOT LABELLED "
        "when stored, in 2 images; hide future 5 in 1"
    )
    for policy in ("current", "stored"):
        data = own_data(every_id, tmp_path, step=2, setting="overlap", labels=policy)
        data.replay({"123": 0, "34": 1})
        assert "WERE NOT LABELLED" not in data.leakage()
    data = own_data(every_id, tmp_path, step=2, setting="sequential", labels="all_seen")
    data.replay({"123": 1, "12": 1})
    assert "WERE NOT LABELLED" not in data.leakage(), "they were, in this setting"


def test_audit_stops_a_future_class_of_all_seen(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=2, setting="overlap", labels="all_seen")
    data.replay({"12345": 0})
    data.replay_sets[0].table[5] = 5
    with pytest.raises(AssertionError, match=r"exemplars .* label ids 5 leak into the loss"):
        data.leakage()


@pytest.mark.parametrize("policy", ["current", "stored", "all_seen"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_hidden_labels_do_not_move_the_training_labels(every_id, tmp_path, setting, policy):
    """The sharp form: whatever a hidden class is in the mask, the label maps are the same."""
    data = own_data(every_id, tmp_path, step=2, setting=setting, labels=policy)
    data.replay({"123": 0, "1234": 1, "12345": 0})
    for dataset in (data.train_set, *data.replay_sets):
        visible = set(np.flatnonzero((dataset.table > 0) & (dataset.table < 255)))
        hidden = [label for label in range(1, 6) if label not in visible]
        assert all(dataset.table[label] == 0 for label in hidden)
        before = dataset[0].label
        mask = dataset.source.load_mask(dataset.indices[0])
        swapped = mask.copy()
        for label, other in zip(hidden, [*hidden[1:], 0], strict=True):
            swapped[mask == label] = other
        assert (dataset.table[swapped] == dataset.table[mask]).all()
        assert set(before.unique().tolist()) <= {0, 255, *dataset.table[list(visible)].tolist()}


def test_audit_stops_a_leak(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=1, setting="overlap")
    data.train_set.table[5] = 5
    with pytest.raises(AssertionError, match="label ids 5 leak into the loss"):
        data.leakage()
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    presence = np.zeros((1, len(data.task.ids)), dtype=bool)
    part = Part("images", presence, data.train_set.table, (), ())
    assert "show none" in audit(data.task, [part])


@pytest.mark.parametrize(
    ("setting", "leaks"), [("overlap", True), ("disjoint", True), ("sequential", False)]
)
def test_audit_stops_an_old_class(every_id, tmp_path, setting, leaks):
    """But in `sequential` its labels are given."""
    data = own_data(every_id, tmp_path, step=2, setting=setting)
    data.train_set.table[:4] = 0, 1, 0, 3
    if not leaks:
        assert "images show 1, 3-4; hide old 2 in " in data.leakage()
        return
    with pytest.raises(AssertionError, match=r"^images: label ids 1, 3 leak into the loss$"):
        data.leakage()


@pytest.mark.parametrize("policy", ["current", "stored"])
def test_audit_stops_an_old_class_of_the_exemplars(every_id, tmp_path, policy):
    """Of a step that is neither this one nor the one that stored them."""
    data = own_data(every_id, tmp_path, step=2, setting="overlap", labels=policy)
    data.replay({"123": 0, "13": 0})
    data.replay_sets[0].table[3] = 3
    with pytest.raises(AssertionError, match=r"^exemplars .*: label ids 3 leak into the loss$"):
        data.leakage()


def test_void_masking_is_no_leak(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=1, setting="overlap")
    data.train_set.table[5] = 255
    assert "show 3;" in data.leakage()


# ---------------------------------------------------------------------------- exemplars in training
def test_exemplars_join_the_images_of_the_step(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=2, setting="overlap", labels="stored")
    data.replay({"1": 0, "13": 1, "4": 1})
    joined = data.train_loader.dataset
    names = [*data.train_set.names, "1", "13", "4"]
    assert [joined[i, 3].name for i in range(len(joined))] == names
    own, replayed = (
        joined[names.index("4"), 3],  # step 2's own image, and the exemplar of the same image
        joined[len(joined) - 1, 3],
    )
    assert own.name == replayed.name == "4"
    assert not torch.equal(own.image, replayed.image), "another crop"
    assert 4 in replayed.label.unique(), "stored at step 1, but its new class is no background"


def test_memory_of_another_data_set(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=1)
    with pytest.raises(UserError, match="image nowhere, which is not in the training list"):
        data.replay({"1": 0, "nowhere": 0})


# ------------------------------------------------------------------------------------ half batches
def mixed(length=50, batch_size=12, rank=0, world=1, accumulate=1, exemplars=20, epoch=3, skip=0):
    sampler = ShuffledBatches(
        length, batch_size, rank, world, ("seed", 1), accumulate, exemplars=exemplars
    )
    sampler.set_epoch(epoch, skip)
    batches = list(sampler)
    assert len(batches) == len(sampler) - skip * accumulate
    return batches


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("exemplars", [1, 4, 6, 20, 300])
def test_half_of_every_batch_is_replayed(size, exemplars):
    """The rest is as without a memory, at the same places; iterations are as many."""
    for epoch in range(4):
        plain, halves = (
            mixed(batch_size=size, exemplars=count, epoch=epoch) for count in (0, exemplars)
        )
        assert len(plain) == len(halves) == 50 // size
        for own, batch in zip(plain, halves, strict=True):
            replayed = [position - 50 for position, _ in batch if position >= 50]
            assert len(batch) == size
            assert len(replayed) == size // 2
            assert all(0 <= position < exemplars for position in replayed)
            assert len(set(replayed)) == min(size // 2, exemplars)
            kept = [key for key in batch if key[0] < 50]
            assert kept == [a for a, b in zip(own, batch, strict=True) if b[0] < 50]


def test_which_places_are_replayed_changes():
    places = [
        tuple(place for place, (position, _) in enumerate(batch) if position >= 50)
        for epoch in range(10)
        for batch in mixed(epoch=epoch)
    ]
    assert len(set(places)) > 30, "a random half"
    assert {place for each in places for place in each} == set(range(12))


def test_exemplars_come_in_permutations():
    """7 of them, 3 a batch: 7 batches hold each three times, in another order every time."""
    drawn = [
        position - 600
        for batch in mixed(length=600, batch_size=6, exemplars=7)
        for position, _ in batch
        if position >= 600
    ]
    assert len(drawn) == 300
    counts = [drawn.count(exemplar) for exemplar in range(7)]
    assert max(counts) - min(counts) <= 1
    for start in range(0, 294, 21):
        assert sorted(drawn[start : start + 21]) == sorted(3 * [*range(7)])
    assert len({tuple(drawn[start : start + 21]) for start in range(0, 294, 21)}) > 10


def test_every_draw_is_another_crop():
    keys = [key for epoch in range(3) for batch in mixed(exemplars=4, epoch=epoch) for key in batch]
    replayed = [key for key in keys if key[0] >= 50]
    assert len(replayed) == 3 * 4 * 6
    assert len({draw for _, draw in replayed}) == len(replayed)
    assert {draw for position, draw in keys if position < 50} == {0, 1, 2}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("exemplars", [5, 20])
def test_half_batches_of_any_number_of_ranks(world, accumulate, exemplars):
    """An iteration has the same keys however it is shared out."""
    size = 12 // (world * accumulate)
    parts = [
        mixed(batch_size=size, rank=rank, world=world, accumulate=accumulate, exemplars=exemplars)
        for rank in range(world)
    ]
    for number, whole in enumerate(mixed(exemplars=exemplars)):
        shares = range(number * accumulate, (number + 1) * accumulate)
        found = [key for part in parts for share in shares for key in part[share]]
        assert {len(part[share]) for part in parts for share in shares} == {size}
        assert sorted(found) == sorted(whole)


@pytest.mark.parametrize("skip", [0, 1, 3, 4])
def test_half_batches_go_on_where_a_run_was_stopped(skip):
    whole = mixed(batch_size=4, world=1, accumulate=3)
    assert mixed(batch_size=4, world=1, accumulate=3, skip=skip) == whole[3 * skip :]
    assert mixed(epoch=4) != mixed(epoch=3) == mixed(epoch=3)


def test_the_memory_leaves_the_length_of_an_epoch(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=2, labels="all_seen", mix="half_batch")
    data.splits["train"] = {**data.splits["train"], "batch_size": 3}
    own = len(data.train_set)
    data.replay({"1": 0, "12": 0, "13": 1})
    assert data.train_batches.iterations == own // 3
    data.train_batches.set_epoch(1)
    for batch in data.train_loader:
        assert batch.replayed.sum() == 1
        (name,) = (n for n, old in zip(batch.name, batch.replayed, strict=True) if old)
        assert name in ("1", "12", "13")
    alone = own_data(every_id, tmp_path, step=2, mix="half_batch")
    alone.splits["train"] = data.splits["train"]
    assert alone.train_batches.exemplars == 0, "nothing to mix in"


def test_half_of_one_image_is_nothing(every_id, tmp_path):
    data = own_data(every_id, tmp_path, step=2, mix="half_batch", mem_size=5)
    data.splits["train"] = {**data.splits["train"], "batch_size": 1}
    with pytest.raises(UserError, match=r"mix is 'half_batch', but half of .*batch_size\) 1 × 1 "):
        data.check_mix()


# --------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def three_steps(toy_root, tmp_path_factory, two_threads):
    """Steps 0 to 2 with memory, and the config."""
    folder = tmp_path_factory.mktemp("memory")
    steps = [list(range(1, 16)), [16, 17], [18, 19, 20]]
    config = write_config(folder / "m.json", toy_root, name="own", steps=steps)
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"]["memory"] = {"mem_size": 12, "labels": "stored"}
    tree["data_loader"]["args"]["train"]["batch_size"] = 4
    config.write_text(json.dumps(tree))
    flags = ("--epochs", "1")
    runs = [train(config, *flags)]
    runs += [train(config, *flags, "--freeze_bn", "--task_step", t) for t in ("1", "2")]
    return folder, config, runs


def test_memory_of_a_run(three_steps):
    _, _, (_, one, two) = three_steps
    first = exemplars.read(one.step_dir() / "memory.json")
    second = exemplars.read(two.step_dir() / "memory.json")
    assert list(first) == ["step_1"]
    assert list(second) == ["step_2", "step_1"]
    assert second["step_1"] == first["step_1"]
    for t, stored in ((1, first), (2, second)):
        kept = exemplars.stored(stored, t)
        assert 0 < len(kept) <= 12
        assert all(1 <= label <= (15, 17)[t - 1] for c in kept for label in c.ids)
    # Masks of step 1 name no class of step 0, so those come from what was stored before.
    before = {c.name: c.ids for c in exemplars.stored(first, 1)}
    again = [c for c in exemplars.stored(second, 2) if c.name in before]
    assert any(min(c.ids) <= 15 for c in again)
    assert all({*before[c.name]} <= {*c.ids} for c in again)
    later = (two.log_dir() / "info.log").read_text()
    assert f"candidates chosen, {len(before)} of them stored before" in later
    log = (one.log_dir() / "info.log").read_text()
    kept = exemplars.stored(first, 1)
    assert f"memory: {len(kept)} of " in log
    assert f"memory: {CLASS_NAMES[16]}: " not in log, "a new class takes no turn"
    for number in range(1, 16):
        taken = [line for line in log.splitlines() if f"memory: {CLASS_NAMES[number]}: " in line]
        assert len(taken) == 1, "every class is named, with how many and which"
    assert all(c.name in log for c in kept)
    assert log.count("leakage audit") == 1
    assert "exemplars (stored labels, stored at step 0) show " in log
    assert "WARNING memory.labels is 'stored', but dkd reads labels of new classes only" in log


def test_stored_labels_reach_a_method_that_learns_old_classes(three_steps, tmp_path):
    _, config, (zero, *_) = three_steps
    saved = tmp_path / "runs"
    (saved / "models" / zero.run_folder.name).mkdir(parents=True)
    (saved / "models" / zero.run_folder.name / "step_0").symlink_to(zero.step_dir().resolve())
    flags = ("--epochs", "1", "--freeze_bn", "--task_step", "1", "--save_dir", str(saved))
    run = train(config, *flags, "--method", "finetune")
    log = (run.log_dir() / "info.log").read_text()
    assert "memory.labels is 'stored', but" not in log
    (line,) = [line for line in log.splitlines() if "leakage audit" in line]
    shown = line.split("exemplars (stored labels, stored at step 0) show ")[1].split(";")[0]
    assert shown.startswith("1-"), "old classes of the step that stored them"


def test_half_batches_go_on_inside_an_epoch_to_the_same_bits(three_steps, tmp_path, monkeypatch):
    _, config, (zero, *_) = three_steps
    tree = json.loads(config.read_text())
    memory_block = {"mem_size": 12, "labels": "all_seen", "mix": "half_batch"}
    tree["data_loader"]["args"]["memory"] = memory_block
    half = tmp_path / "half.json"
    half.write_text(json.dumps(tree))

    def call(folder, *flags):
        models = tmp_path / folder / "models" / zero.run_folder.name
        if not models.exists():
            models.mkdir(parents=True)
            (models / "step_0").symlink_to(zero.step_dir().resolve())
        flags += ("--method", "finetune", "--epochs", "2", "--freeze_bn", "--task_step", "1")
        flags += ("--bs", "2")
        return train(half, *flags, "--save_dir", str(tmp_path / folder))

    whole = call("whole")
    (line,) = re.findall("leakage audit.*", (whole.log_dir() / "info.log").read_text())
    assert "WERE NOT LABELLED" not in line, "at step 1, all of step 0 was"
    step, calls = Trainer.train_step, []

    def stopped(trainer, *args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(Interrupted):
            call("parts")
    assert len(calls) == 3
    parts = call("parts", "-r", "auto")
    assert len(calls) == 3
    a, b = (
        torch.load(run.step_dir() / "checkpoint-epoch2.pth", weights_only=True)
        for run in (whole, parts)
    )
    assert a["lr_scheduler"]["last_epoch"] > 2 * 3, "it was stopped inside the first epoch"
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


@pytest.mark.parametrize(("method", "learns"), [("dkd", False), ("finetune", True)])
def test_which_methods_learn_old_classes(method, learns):
    """What `learns_old` promises: labels of old classes move the loss, or do not."""
    task = Task("voc", "own", "overlap", 1, ((1, 2), (3,)), tuple("0123"))
    contract = METHODS[method](task, {})
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(2, c, 4, 4, generator=generator) for c in (3, 4))
    labels = torch.randint(0, 4, (2, 16, 16), generator=generator).to(torch.uint8)
    blind = torch.where((labels == 1) | (labels == 2), 0, labels)
    student, teacher = (ModelOutput(x, x[:, 1:], x[:, 1:]) for x in (new, old))
    losses = [
        sum(t.sum() for t in contract.losses(Batch(None, x), student, teacher, None).values())
        for x in (labels, blind)
    ]
    assert contract.learns_old is learns
    assert torch.equal(*losses) is not learns


def test_a_class_without_candidates_is_reported(three_steps, tmp_path, toy_root):
    """Class 20 is taught at step 0, but no training image shows it."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    lists = "ImageSets/Segmentation"
    (root / lists).mkdir(parents=True)
    for split, folder in (("train_aug", "SegmentationClassAug"), ("val", "SegmentationClass")):
        names = []
        for line in (toy_root / lists / f"{split}.txt").read_text().splitlines():
            name = line.split("/")[-1].removesuffix(".png")
            mask = np.array(Image.open(toy_root / folder / f"{name}.png"))
            mask[mask == 7] = 0
            Image.fromarray(mask).save(root / folder / f"{name}.png")
            image = (toy_root / f"JPEGImages/{name}.jpg").read_bytes()
            (root / f"JPEGImages/{name}.jpg").write_bytes(image)
            names.append(name)
        (root / lists / f"{split}.txt").write_text("\n".join(names))
    config = write_config(tmp_path / "c.json", root)
    train(config, "--epochs", "1")
    run = train(
        config, "--epochs", "1", "--task_step", "1", "--freeze_bn", "--mem_size", "30", "--bs", "4"
    )
    log = (run.log_dir() / "info.log").read_text()
    assert f"WARNING memory: no candidate holds {CLASS_NAMES[7]}" in log
    assert f"memory: {CLASS_NAMES[7]}: 0 exemplars: none" in log


def test_the_memory_is_chosen_again_to_the_same(three_steps, tmp_path):
    _, config, (zero, one, _) = three_steps
    saved = tmp_path / "runs"
    (saved / "models" / zero.run_folder.name).mkdir(parents=True)
    (saved / "models" / zero.run_folder.name / "step_0").symlink_to(zero.step_dir().resolve())
    flags = ("--epochs", "1", "--freeze_bn", "--task_step", "1", "--save_dir", str(saved))
    again = train(config, *flags)
    files = [run.step_dir() / "memory.json" for run in (one, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_processes_read_one_memory(three_steps, tmp_path):
    folder, config, (zero, one, _) = three_steps
    tree = json.loads(config.read_text())
    tree["n_gpu"] = 2
    tree["data_loader"]["args"]["train"]["batch_size"] = 2
    two = folder / "two.json"
    two.write_text(json.dumps(tree))
    saved = tmp_path / "runs"
    (saved / "models" / zero.run_folder.name).mkdir(parents=True)
    (saved / "models" / zero.run_folder.name / "step_0").symlink_to(zero.step_dir().resolve())
    flags = ("--epochs", "1", "--freeze_bn", "--task_step", "1", "--save_dir", str(saved))
    run = train(two, *flags, "--multiprocessing_distributed")
    files = [r.step_dir() / "memory.json" for r in (one, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    a, b = (
        torch.load(r.step_dir() / "checkpoint-epoch1.pth", weights_only=True) for r in (one, run)
    )
    assert a["record"] == b["record"]
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mix", ["concat", "half_batch"])
def test_ranks_share_the_exemplars(every_id, tmp_path, mix):
    """The global batches of two ranks are those of one, exemplars among them."""
    batches = []
    for ranks in ([SINGLE], [Ranks(r, 2, torch.device("cpu")) for r in (0, 1)]):
        names = []
        for one in ranks:
            data = own_data(every_id, tmp_path, step=2, labels="current", mix=mix)
            data.replay({"1": 0, "12": 0})
            data.ranks = one
            data.splits["train"] = {**data.splits["train"], "batch_size": 4 // len(ranks)}
            data.train_loader.batch_sampler.set_epoch(2)
            names.append(
                [
                    {
                        (name, bool(old), image.sum().item())
                        for name, old, image in zip(b.name, b.replayed, b.image, strict=True)
                    }
                    for b in data.train_loader
                ]
            )
        batches.append([set().union(*parts) for parts in zip(*names, strict=True)])
        assert {len(batch) for batch in batches[-1]} == {4}
    assert batches[0] == batches[1]
