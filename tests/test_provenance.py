"""A figure is of these weights, and these are of this data and of that previous step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_model import HeadPlan
from data_loader import contents
from data_loader.contents import changes, contents_table
from data_loader.voc import VOC
from models.model import DeepLabV3
from scripts.toy_data.tree import make_toy_voc
from tests.helpers import after, send, train, write_config
from trainer import methods
from trainer.methods.dkd import DKD
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.errors import UserError
from utils.processes.signals import Interrupted

STEPS = [list(range(1, 16)), [16, 17], [18, 19, 20]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data, config and the two finished first steps of a task; tests copy it."""
    root = tmp_path_factory.mktemp("finished")
    make_toy_voc(root / "voc", train=32, val=12, size=(64, 48), seed=5)
    write_config(root / "toy.json", root / "voc", name="own", steps=STEPS)
    for step in (0, 1):
        call(root, step)
    return root


def call(root, step, *flags, epochs=2):
    flags = ("--lr", "0.001", "--epochs", str(epochs), "--bs", "4", *flags)
    paths = ("--data_dir", str(root / "voc"), "--save_dir", str(root / "runs"))
    return train(root / "toy.json", "--task_step", str(step), *flags, *paths)


@pytest.fixture
def root(finished, tmp_path):
    for name in ("voc", "runs", "toy.json"):
        place = finished / name
        copy = shutil.copytree if place.is_dir() else shutil.copy
        copy(place, tmp_path / name)
    return tmp_path


def folder(root, kind, step):
    return root / "runs" / kind / "overlap_own_toy" / f"step_{step}"


def metrics(root, step):
    return json.loads((folder(root, "log", step) / "metrics.json").read_text())


def weights_of(root, step, epoch=2):
    return files.hash_of(folder(root, "models", step) / files.epoch_file(epoch))


class Killed(BaseException):
    pass


def kill(*_):
    raise Killed


@pytest.fixture
def killed_before_its_test(monkeypatch):
    """A function that calls a step, which ends when its last checkpoint is written."""

    def attempt(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "test", kill)
            with pytest.raises(Killed):
                call(*args, **kwargs)

    return attempt


def logged(root, step):
    return (folder(root, "log", step) / "info.log").read_text()


# ------------------------------------------------------------------ results and their weights
def test_a_result_names_its_weights_and_those_before(root):
    assert metrics(root, 0)["weights_sha256"] == weights_of(root, 0)
    assert metrics(root, 0)["previous_sha256"] is None
    assert metrics(root, 1)["weights_sha256"] == weights_of(root, 1)
    assert metrics(root, 1)["previous_sha256"] == weights_of(root, 0)


def test_figures_of_the_shorter_training_do_not_stay_beside_a_lengthened_one(
    root, killed_before_its_test, capsys
):
    last = folder(root, "models", 1) / "last.pth"
    killed_before_its_test(root, 1, "-r", str(last), epochs=4)
    assert not (folder(root, "log", 1) / "metrics.json").exists()
    kept = folder(root, "log", 1) / "earlier_1" / "metrics.json"
    assert json.loads(kept.read_text())["epoch"] == 2
    capsys.readouterr()
    call(root, 1, "-r", "auto", epochs=4)
    assert "nothing to do" not in capsys.readouterr().out
    result = metrics(root, 1)
    assert (result["epoch"], result["lengthened"]) == (4, [2])
    assert result["weights_sha256"] == weights_of(root, 1, 4)
    call(root, 1, "-r", "auto", epochs=4)
    assert "nothing to do" in capsys.readouterr().out


def test_figures_of_a_deleted_run_are_not_those_of_the_next(root, killed_before_its_test, capsys):
    shutil.rmtree(root / "runs/models")
    killed_before_its_test(root, 0, "--seed", "7", "-r", "auto")
    log = folder(root, "log", 0)
    assert json.loads((log / "earlier_1/metrics.json").read_text())["seed"] == 1
    assert (log / "earlier_1/history.json").is_file()
    call(root, 0, "--seed", "7", "-r", "auto")
    assert metrics(root, 0)["seed"] == 7
    assert metrics(root, 0)["weights_sha256"] == weights_of(root, 0)
    shutil.rmtree(root / "runs/models")
    call(root, 0, "--seed", "8")
    assert json.loads((log / "earlier_2/metrics.json").read_text())["seed"] == 7


def test_a_run_leaves_no_folder_of_earlier_results_where_there_were_none(finished):
    assert not list(finished.rglob("earlier_*"))


def test_other_weights_in_the_place_of_the_tested_ones(root, capsys):
    file = folder(root, "models", 0) / files.epoch_file(2)
    checkpoint = files.load(file)
    checkpoint["state_dict"]["cls.1.bias"] += 1
    for name in (file, file.with_name("last.pth")):
        torch.save(checkpoint, name)
    before = metrics(root, 0)
    call(root, 0, "-r", "auto")
    assert "nothing to do" not in capsys.readouterr().out
    assert metrics(root, 0)["weights_sha256"] == weights_of(root, 0) != before["weights_sha256"]
    kept = folder(root, "log", 0) / "earlier_1/metrics.json"
    assert json.loads(kept.read_text()) == before


@pytest.mark.parametrize("content", ["", "[]", '{"weights_sha256": 3}', '{"epoch": 2}'])
def test_a_result_that_names_no_weights_is_made_anew(root, content, capsys):
    (folder(root, "log", 0) / "metrics.json").write_text(content)
    call(root, 0, "-r", "auto")
    assert "nothing to do" not in capsys.readouterr().out
    assert metrics(root, 0)["weights_sha256"] == weights_of(root, 0)


def test_a_step_whose_previous_one_was_trained_anew(root):
    shutil.rmtree(folder(root, "models", 0))
    call(root, 0, "--seed", "7")
    says = r"trained from other weights of step 0 than those that now lie in .*step_0; train it"
    with pytest.raises(UserError, match=says):
        call(root, 1, "-r", "auto", "--seed", "1")


def test_an_unfinished_step_whose_previous_one_was_trained_anew(root, monkeypatch):
    shutil.rmtree(folder(root, "models", 1))
    interrupt(root, monkeypatch, 1)
    checkpoint = files.load(folder(root, "models", 0) / files.epoch_file(2))
    checkpoint["state_dict"]["cls.1.bias"] += 1
    torch.save(checkpoint, folder(root, "models", 0) / files.epoch_file(2))
    with pytest.raises(UserError, match="began with other weights of the previous step"):
        call(root, 1, "-r", "auto")


def interrupt(root, monkeypatch, step, *flags):
    """Stop a step in its first epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", after(1, Trainer.train_step, send(signal.SIGTERM)))
        with pytest.raises(Interrupted):
            call(root, step, *flags)


def test_half_written_files_of_the_log_are_cleared_away(root):
    parts = [folder(root, "log", 0) / name for name in (".metrics.json.a.part", "val/.m.b.part")]
    for part in parts:
        part.write_text("{")
    (folder(root, "log", 0) / "metrics.json").unlink()
    call(root, 0, "-r", "auto")
    assert not any(part.exists() for part in parts)


def test_the_hash_of_weights_is_of_what_they_are_not_of_how_they_lie():
    state = {"a": torch.arange(24.0).reshape(1, 2, 3, 4), "b": torch.tensor(3)}
    expected = files.weights_hash(state)
    laid = {"b": state["b"], "a": state["a"].to(memory_format=torch.channels_last)}
    assert files.weights_hash(laid) == expected
    assert files.weights_hash({f"module.{k}": v for k, v in state.items()}) == expected
    for other in (
        {"a": state["a"] + 0.5, "b": state["b"]},
        {"a": state["a"].reshape(2, 1, 3, 4), "b": state["b"]},
        {"a": state["a"].to(torch.int32), "b": state["b"]},
        {"c": state["a"], "b": state["b"]},
    ):
        assert files.weights_hash(other) != expected


# ------------------------------------------------------------------ data that changed
def images_of(root, step):
    """Ids of the training images that show a class of a step."""
    reader = VOC("train", str(root / "voc"))
    shown = [
        {*np.unique(reader.load_mask(k)).tolist()} & {*STEPS[step]} for k in range(len(reader))
    ]
    return [entry.id for entry, ids in zip(reader.entries, shown, strict=True) if ids]


def other_mask(root, name):
    """A mask of equal size and time, in which one class has become another."""
    path = root / "voc/SegmentationClassAug" / f"{name}.png"
    status, mask = path.stat(), Image.open(path)
    palette = mask.getpalette()
    pixels = np.array(mask)
    present = [k for k in np.unique(pixels) if 0 < k < 255]
    pixels[pixels == present[0]] = 0
    changed = Image.fromarray(pixels)
    changed.putpalette(palette)
    changed.save(path)
    content = path.read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_a_mask_of_equal_size_and_time_is_noticed_on_resuming(root, monkeypatch):
    shutil.rmtree(folder(root, "models", 1))
    interrupt(root, monkeypatch, 1)
    name = next(iter(set(images_of(root, 1)) - set(images_of(root, 0))), images_of(root, 1)[0])
    path = root / "voc/JPEGImages" / f"{name}.jpg"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=rf"1 image differs \({name}\)"):
        call(root, 1, "-r", "auto")


def test_a_mask_that_changed_between_two_steps_is_named(root):
    name = images_of(root, 0)[0]
    other_mask(root, name)
    says = rf"have changed since step 1 was trained, among them .*: 1 mask differs \({name}\)"
    with pytest.raises(UserError, match=says):
        call(root, 2)
    assert not folder(root, "models", 2).exists() or not list(
        folder(root, "models", 2).glob("*.pth")
    )


def test_images_replaced_and_the_list_reversed_between_two_steps(root):
    for path in (root / "voc/JPEGImages").iterdir():
        Image.new("RGB", (64, 48), (9, 9, 9)).save(path)
    listed = root / "voc/ImageSets/Segmentation/train_aug.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(UserError, match=r"\d\d images differ \(toy_\d+, .* more\)"):
        call(root, 2)


def test_images_that_were_trained_on_must_stay(root):
    listed = root / "voc/ImageSets/Segmentation/train_aug.txt"
    gone = images_of(root, 0)[0]
    listed.write_text(
        "".join(line for line in listed.read_text().splitlines(True) if gone not in line)
    )
    with pytest.raises(UserError, match="1 image is no longer in the list"):
        call(root, 2)


def test_what_no_step_was_trained_on_may_change_with_a_word(root):
    """Further images, and test images: the run goes on and tells."""
    data = root / "voc"
    fresh = images_of(root, 2)[0]
    for place, ending in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        shutil.copy(data / place / f"{fresh}.{ending}", data / place / f"fresh.{ending}")
    with open(data / "ImageSets/Segmentation/train_aug.txt", "a") as listed:
        listed.write("/JPEGImages/fresh.jpg /SegmentationClassAug/fresh.png\n")
    test = (data / "ImageSets/Segmentation/val.txt").read_text().split()[0]
    Image.new("RGB", (64, 48)).save(data / "JPEGImages" / f"{test}.jpg")
    call(root, 2)
    log = logged(root, 2)
    assert "train list have changed since step 1 was trained: 1 image is new (fresh)" in log
    assert f"val list have changed since step 1 was trained: 1 image differs ({test})" in log
    before, after = (metrics(root, step)["lists"]["test"]["contents"] for step in (1, 2))
    assert before != after


def test_the_same_data_elsewhere_are_the_same(root):
    (root / "voc").rename(root / "moved")
    (root / "voc").symlink_to(root / "moved")
    call(root, 2)
    assert "have changed" not in logged(root, 2)


def test_files_are_read_once_and_again_when_they_change(toy_root, tmp_path, monkeypatch):
    data = tmp_path / "voc"
    shutil.copytree(toy_root, data)
    reader, read = VOC("train", str(data)), []
    original = contents._hash_of
    monkeypatch.setattr(contents, "_hash_of", lambda path: read.append(path) or original(path))
    first = contents_table(reader, tmp_path / "cache")
    assert first.shape == (48, 3)
    assert len(read) == 96
    assert (contents_table(reader, tmp_path / "cache") == first).all()
    assert len(read) == 96
    victim = reader.entries[7].image
    status = victim.stat()
    content = bytearray(victim.read_bytes())
    content[-30] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = contents_table(reader, tmp_path / "cache")
    assert read[96:] == [victim]
    assert np.argwhere(first != second).tolist() == [[7, 1]]
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:50])
    assert (contents_table(reader, tmp_path / "cache") == second).all()
    assert len(read) == 97 + 96


def test_changes_in_words():
    there = np.array([[1, 10, 20], [2, 11, 21], [3, 12, 22]])
    names = ["a", "b", "c"]
    assert changes(there, there, names) == []
    here = np.array([[2, 11, 0], [1, 10, 99], [4, 5, 6]])
    assert changes(here, there, ["b", "a", "d"]) == [
        "1 image is no longer in the list",
        "1 image is new (d)",
        "2 masks differ (a, b)",
        "the order of the list differs",
    ]
    only = np.array([True, False, False])
    assert changes(here, there, ["b", "a", "d"], only) == ["1 mask differs (a)"]


# ------------------------------------------------------------------ the number of epochs
def test_epochs_cannot_change_inside_a_step(root, monkeypatch):
    shutil.rmtree(folder(root, "models", 1))
    interrupt(root, monkeypatch, 1)
    last = folder(root, "models", 1) / "last.pth"
    for start in ("auto", str(last)):
        with pytest.raises(UserError, match=r"begun with 2, over which .*; give --epochs 2, or"):
            call(root, 1, "-r", start, epochs=4)


def test_a_finished_step_asked_for_other_epochs_names_the_ways(root):
    last = folder(root, "models", 1) / "last.pth"
    says = rf"finished step of 2 epochs, but .* is 4; give --epochs 2, .* -r {last} --epochs 4"
    with pytest.raises(UserError, match=says):
        call(root, 1, "-r", "auto", epochs=4)
    with pytest.raises(UserError, match=r"is 1; give --epochs 2, or train 1 epochs anew") as told:
        call(root, 1, "-r", "auto", epochs=1)
    assert "lengthens" not in str(told.value)


def test_a_lengthened_step_is_no_step_of_that_length(root):
    last = folder(root, "models", 0) / "last.pth"
    call(root, 0, "-r", str(last), epochs=4)
    assert "the finished step of 2 epochs is lengthened to 4: its learning rate" in logged(root, 0)
    with pytest.raises(UserError, match=r"lengthened after epochs is \[\] here and \[2\] there"):
        call(root, 0, "--name", "other", "--base", str(folder(root, "models", 0)), epochs=4)


# ------------------------------------------------------------------ the previous step's weights
class Averaging(DKD):
    """DKD that ends in the mean of its weights and of the previous step's."""

    needs_previous_state = True
    seen: dict[str, torch.Tensor]

    def end_step(self, context):
        if self.task.step == 0:
            assert context.previous_state is None
            return
        type(self).seen = context.previous_state
        with pytest.raises(RuntimeError, match=r"rewritten: .* StepContext\.previous_state"):
            context.teacher.state_dict()
        with pytest.raises(RuntimeError, match="rewritten"):
            dict(context.teacher.named_parameters())
        for name, value in context.student.state_dict().items():
            if name in context.previous_state and value.is_floating_point():
                value.copy_((value + context.previous_state[name]) / 2)


def test_a_method_gets_the_weights_of_the_previous_step_as_they_were_loaded(
    root, monkeypatch, tmp_path
):
    shutil.rmtree(folder(root, "models", 1))
    plain = call(root, 1, "--name", "toy", "--freeze_bn")
    before = files.load(folder(root, "models", 0) / files.epoch_file(2))["state_dict"]
    trained = files.load(plain.step_dir() / files.epoch_file(2))["state_dict"]
    shutil.rmtree(folder(root, "models", 1))
    monkeypatch.setitem(methods.METHODS, "dkd", Averaging)
    call(root, 1, "--freeze_bn")
    fused = files.load(folder(root, "models", 1) / files.epoch_file(2))["state_dict"]
    assert Averaging.seen.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(Averaging.seen[name], value), name
        if value.is_floating_point():
            torch.testing.assert_close(fused[name], (value + trained[name]) / 2)


def test_what_is_only_run_does_not_give_away_rewritten_weights():
    from models.folding import fold_for_inference

    model = DeepLabV3(HeadPlan((1, 2), detached_first=True), backbone="tiny", freeze_all_bn=True)
    assert model.state_dict()
    fold_for_inference(model.eval())
    for ask in (model.state_dict, lambda: list(model.named_parameters())):
        with pytest.raises(RuntimeError, match="rewritten"):
            ask()
    assert len(list(model.parameters())) > 0


def test_every_path_of_results_is_told(root):
    """Nothing of the log is written beside what the documents name."""
    names = {path.name for path in Path(folder(root, "log", 1)).iterdir()}
    assert names == {"info.log", "metrics.json", "history.json", "val"}
