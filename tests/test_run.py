"""Whole runs on the toy data: train, evaluate, resume, compare; what they leave on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_trainer import parse_monitor
from tests.helpers import evaluation, train, write_config
from trainer.methods import METHODS
from trainer.trainer import Trainer
from utils import VERSION
from utils import checkpoint as files
from utils.errors import UserError
from utils.history import History
from utils.metric import merge_future

RELEASED_KEYS = (
    "arch",
    "epoch",
    "state_dict",
    "optimizer",
    "lr_scheduler",
    "scaler",
    "monitor_best",
)


STEP_0 = "base/runs/models/overlap_15-5_toy/step_0"


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def same_state(a, b):
    a, b = files.load(a)["state_dict"], files.load(b)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def base(toy_root, tmp_path_factory):
    """A config and a finished step 0, which the tests copy."""
    folder = tmp_path_factory.mktemp("base")
    config = write_config(folder / "toy.json", toy_root)
    parsed = train(config, "--epochs", "2")
    return folder, config, parsed


@pytest.fixture
def after_base(base, tmp_path):
    """The finished step 0 in a folder of this test's own."""
    shutil.copytree(base[0], tmp_path / "base")
    return base[1], ["--save_dir", str(tmp_path / "base" / "runs")]


def test_files_of_a_run(base):
    _, _, parsed = base
    folder = parsed.step_dir()
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "config.json", "last.pth", "checkpoint-epoch2.pth"),
    }
    assert folder.parts[-3:] == ("models", "overlap_15-5_toy", "step_0")
    checkpoint = torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)
    assert set(RELEASED_KEYS) <= checkpoint.keys()
    assert checkpoint["arch"] == "DeepLabV3"
    assert checkpoint["epoch"] == 2
    written = json.loads((folder / "config.json").read_text())
    assert written["data_loader"]["args"]["task"]["name"] == "15-5"
    assert written["trainer"]["epochs"] == 2
    log = (parsed.log_dir() / "info.log").read_text()
    assert "train list: " in log
    assert "sha256" in log
    assert "epoch 2/2: loss" in log


def test_validation_is_one_line_that_says_what_it_counts(base):
    """Its figures are others than the test's, whose table follows."""
    lines = (base[2].log_dir() / "info.log").read_text().splitlines()
    (val,) = [line for line in lines if "INFO val, step 0" in line]
    assert "labels of the new classes alone, the others count as background: Pixel_Acc" in val
    assert f"Mean_Intersection_over_Union_overall {overall(base[2].log_dir() / 'val'):.2f}" in val
    assert sum(" id  class " in line for line in lines) == 1


def overall(folder):
    return metrics(folder)["metrics"]["Mean_Intersection_over_Union"]["overall"]


def test_metrics_file(base):
    report = metrics(base[2].log_dir())
    confusion = np.array(report["confusion"])
    assert confusion.shape == (16, 16)
    assert [row["name"] for row in report["classes"]][:2] == ["background", "red disc"]
    assert confusion.sum(1).tolist() == [row["pixels"] for row in report["classes"]]
    assert report["metrics"]["Mean_Intersection_over_Union"].keys() == {"overall"}
    iou = [row["IoU"] for row in report["classes"]]
    mean = report["metrics"]["Mean_Intersection_over_Union"]["overall"]
    assert np.mean(iou) == pytest.approx(mean)
    assert [row["label_id"] for row in report["future_classes"]] == [16, 17, 18, 19, 20]
    wide = np.array(report["wide"])
    assert wide.shape == (21, 16)
    assert merge_future(wide, 0).tolist() == report["confusion"]
    assert wide[16:].sum(1).tolist() == [row["pixels"] for row in report["future_classes"]]
    assert wide[16:].sum() > 0, "future classes occur in the test images"
    assert (report["seed"], report["version"]) == (1, VERSION)
    assert report["lists"].keys() == {"train", "val", "test"}
    assert report["lists"]["test"]["images"] == report["images"]
    assert report["protocol"] == {
        "future_classes": 0,
        "background": True,
        "images": "centre crop 48",
    }


@pytest.mark.parametrize("future", [0, 255])
def test_metrics_count_future_classes_as_the_config_says(after_base, future):
    """As background or not at all, in the figures as in the matrix beside them."""
    config, flags = after_base
    key = f"data_loader.args.test.args.masking_value={future}"
    report = metrics(train(config, *flags, "--test", "--set", key).log_dir())
    wide = np.array(report["wide"])
    counted = wide[:16].copy()
    if future == 0:
        counted[0] += wide[16:].sum(0)
    correct, pixels = counted.diagonal(), counted.sum(1)
    iou = 100 * correct / np.maximum(pixels + counted.sum(0) - correct, 1)
    found = {name: result["overall"] for name, result in report["metrics"].items()}
    assert found == pytest.approx(
        {
            "Pixel_Accuracy": 100 * correct.sum() / pixels.sum(),
            "Pixel_Accuracy_Class": np.mean(100 * correct / np.maximum(pixels, 1)),
            "Mean_Intersection_over_Union": iou.mean(),
        }
    )
    assert report["confusion"] == counted.tolist()
    assert [row["IoU"] for row in report["classes"]] == pytest.approx(iou.tolist())
    assert [row["pixels"] for row in report["classes"]] == pixels.tolist()
    assert report["protocol"]["future_classes"] == future


def test_validation_hides_classes_as_its_own_masking_value_says(base, toy_config):
    """That of the test is another key."""
    key = "data_loader.args.val.args.masking_value=255"
    counted = []
    for parsed, value in ((base[2], 0), (train(toy_config, "--epochs", "1", "--set", key), 255)):
        validation, test = metrics(parsed.log_dir() / "val"), metrics(parsed.log_dir())
        assert validation["protocol"]["future_classes"] == value
        assert test["protocol"]["future_classes"] == 0
        counted.append(np.sum(validation["confusion"]))
    assert counted[1] < counted[0], "later classes are void"


def test_a_history_goes_on_where_the_checkpoint_does(tmp_path):
    history = History(tmp_path, torch.device("cpu"))
    for epoch in (1, 2, 3):
        history.add(8, epoch=epoch, losses={"loss": float(epoch)})
    again = History(tmp_path, torch.device("cpu"))
    again.resume(2)
    again.add(8, epoch=3, losses={"loss": 0.5, "kd": float("inf")})
    written = json.loads((tmp_path / "history.json").read_text())
    assert [epoch["losses"] for epoch in written["epochs"]] == [{"loss": x} for x in (1, 2, 0.5)]
    assert written["global_batch"] == 8


def test_the_peak_of_memory_is_that_of_all_processes(tmp_path, monkeypatch):
    peaks = iter([300.0, 100.0, 200.0, 500.0])
    monkeypatch.setattr("utils.history.peak", lambda device: next(peaks))
    found = []
    for epoch in (1, 2, 3, 4):
        history = History(tmp_path, torch.device("cpu"))
        history.resume(epoch - 1)
        history.add(8, epoch=epoch, losses={})
        found.append(json.loads((tmp_path / "history.json").read_text())["peak_memory_mib"])
    assert found == [300, 300, 300, 500]


def test_history_file(base):
    """Epochs, their losses and what they cost."""
    parsed = base[2]
    history = json.loads((parsed.log_dir() / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
    log = (parsed.log_dir() / "info.log").read_text()
    for epoch in history["epochs"]:
        assert epoch["whole"]
        terms = "".join(f"{name} {value:.4f}, " for name, value in epoch["losses"].items())
        assert f"epoch {epoch['epoch']}/2: {terms}lr {epoch['lr']:.3e}" in log
        images = epoch["images_per_s"] * epoch["seconds"]
        assert images % 8 == pytest.approx(0, abs=1e-6) or images % 8 == pytest.approx(8, abs=1e-6)
    assert history["device"] == "cpu"
    assert history["peak_memory_mib"] > 50


@pytest.mark.parametrize("method", ["dkd", "finetune"])
def test_second_step_and_evaluation_of_a_released_folder(after_base, tmp_path, method):
    """Train step 1, strip the checkpoint and the config to what released ones hold, evaluate."""
    config, flags = after_base
    step1 = train(
        config, *flags, "--task_step", "1", "--freeze_bn", "--method", method, "--epochs", "1"
    )
    trained = metrics(step1.log_dir())
    groups = trained["metrics"]["Mean_Intersection_over_Union"]
    assert groups.keys() == {"old", "new", "harmonic", "overall"}

    released = tmp_path / "released"
    released.mkdir()
    checkpoint = torch.load(step1.step_dir() / "checkpoint-epoch1.pth", weights_only=True)
    torch.save({key: checkpoint[key] for key in RELEASED_KEYS}, released / "weights.pth")
    tree = json.loads((step1.step_dir() / "config.json").read_text())
    del tree["amp_dtype"]
    if method == "dkd":
        del tree["method"]
    tree["written_by_another_version"] = {"a": 1}
    tree["trainer"]["monitor"] = "max a_value_of_another_version"
    tree["data_loader"]["args"]["memory"]["mem_size"] = 100  # as in released DKD-M weights
    (released / "config.json").write_text(json.dumps(tree))
    out = tmp_path / "evaluated"
    evaluated = train(
        None,
        *("-d", "0", "--test", "-r", str(released / "weights.pth"), "--save_dir", str(out)),
        mode="eval",
    )
    report = evaluation(evaluated)
    assert report["confusion"] == trained["confusion"]
    assert report["metrics"] == trained["metrics"]


def test_evaluations_do_not_overwrite_each_other(after_base, tmp_path):
    """Other weights have a result of their own; the same weights, wherever they lie, replace it."""
    config, flags = after_base
    checkpoint = torch.load(tmp_path / STEP_0 / "checkpoint-epoch2.pth", weights_only=True)
    paths = [tmp_path / name / "weights.pth" for name in ("DKD", "DKD-M", "copy")]
    for path in paths:
        path.parent.mkdir()
        torch.save(checkpoint, path)
        checkpoint["epoch"] = 7
    shutil.copy(paths[0], paths[2])

    def evaluate(path):
        parsed = train(config, *flags, "--test", "-r", str(path))
        found = (parsed.log_dir() / "eval").glob("weights-*/metrics.json")
        return sorted((metrics(file.parent)["epoch"], file) for file in found)

    first = evaluate(paths[0])
    both = evaluate(paths[1])
    assert [epoch for epoch, _ in first] == [2]
    assert [epoch for epoch, _ in both] == [2, 7]
    assert both[0] == first[0]
    assert evaluate(paths[2]) == both
    assert metrics(both[0][1].parent)["weights"] == str(paths[2])


def test_training_test_flag_repeats_the_test(after_base):
    config, flags = after_base
    first = train(config, *flags, "--test")
    before = metrics(first.log_dir())
    (first.log_dir() / "metrics.json").unlink()
    train(config, *flags, "--test")
    assert metrics(first.log_dir())["confusion"] == before["confusion"]


@pytest.mark.parametrize("step", [0, 1])
def test_resumed_run_equals_an_uninterrupted_one(after_base, tmp_path, step, monkeypatch):
    """Stopped after epoch 2 of 3 and resumed: the same bits. Dropout is on at step 0."""
    config, flags = after_base
    flags = [*flags, "--task_step", str(step), "--epochs", "3", *(["--freeze_bn"] if step else [])]
    if step == 0:
        flags += ["--name", "fresh"]
    whole = train(config, *flags)
    whole_file = tmp_path / "whole.pth"
    shutil.copy(whole.step_dir() / "checkpoint-epoch3.pth", whole_file)
    whole_metrics = metrics(whole.log_dir())
    shutil.rmtree(whole.step_dir())

    epochs = Trainer.train_epoch

    def stop_in_the_third(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        epochs(self, epoch)

    monkeypatch.setattr(Trainer, "train_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(config, *flags)
    monkeypatch.undo()
    last = whole.step_dir() / "last.pth"
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert not (whole.step_dir() / "checkpoint-epoch3.pth").exists()
    written = last.parent / "config.json"
    tree = json.loads(written.read_text())
    tree["fast"]["fused_loss"] = True  # a switch of an older version
    written.write_text(json.dumps(tree))
    torch.manual_seed(123)  # whatever the process did before must not matter
    train(None, "-r", str(last))  # config, step and folder come from beside the checkpoint
    assert same_state(whole.step_dir() / "checkpoint-epoch3.pth", whole_file)
    assert metrics(whole.log_dir())["confusion"] == whole_metrics["confusion"]


def test_taken_folder_is_not_overwritten(after_base):
    config, flags = after_base
    with pytest.raises(UserError, match="already holds a run") as caught:
        train(config, *flags)
    for way in ("-r ", "--test", "--name", "--save_dir", "delete"):
        assert way in str(caught.value)


def test_step_1_of_an_unfinished_step_0(after_base, tmp_path):
    config, flags = after_base
    folder = tmp_path / STEP_0
    checkpoint = torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)
    torch.save({**checkpoint, "finished": False}, folder / "checkpoint-epoch2.pth")
    with pytest.raises(UserError, match="not of a finished run"):
        train(config, *flags, "--task_step", "1", "--freeze_bn")


def test_step_1_of_another_schedule(after_base, tmp_path, toy_root):
    """The order of classes is checked, not only their number."""
    _, flags = after_base
    steps = [[2, 1, *range(3, 16)], [16]]
    other = write_config(tmp_path / "other.json", toy_root, steps=steps)
    with pytest.raises(UserError, match="which learnt other classes before step 1"):
        train(other, *flags, "--task_step", "1", "--freeze_bn", "--bs", "4")


def test_weights_of_another_order_of_classes_are_not_tested(after_base, tmp_path, toy_root):
    """Their channels would be taken for other classes."""
    _, flags = after_base
    weights = str(tmp_path / STEP_0 / "checkpoint-epoch2.pth")
    steps = [[2, 1, *range(3, 16)], [*range(16, 21)]]
    other = write_config(tmp_path / "other.json", toy_root, steps=steps)
    with pytest.raises(UserError, match=r"has learnt the label ids \[1, 2.* for \[2, 1, "):
        train(other, *flags, "--test", "-r", weights)


def test_weights_only_file_cannot_be_resumed(after_base, tmp_path):
    config, flags = after_base
    folder = tmp_path / STEP_0
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    torch.save({key: checkpoint[key] for key in RELEASED_KEYS}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no rng, finished, record"):
        train(config, *flags, "--name", "other", "-r", str(tmp_path / "w.pth"))


def test_loss_that_is_not_finite_stops_the_run(toy_config):
    with pytest.raises(UserError) as caught:
        train(toy_config, "--lr", "1e30")
    message = str(caught.value)
    assert "not finite at step 0, epoch 1, iteration " in message
    assert "mbce " in message
    assert "images of the batch: toy_" in message


def test_validation_monitor_and_early_stop(toy_config):
    tree = json.loads(toy_config.read_text())
    tree["trainer"] |= {
        "epochs": 6,
        "validation_period": 1,
        "save_period": 2,
        "monitor": "min val_Mean_Intersection_over_Union_overall",
        "early_stop": 2,
        "tensorboard": True,
    }
    toy_config.write_text(json.dumps(tree))
    parsed = train(toy_config, "--lr", "1e-9", "--freeze_bn")  # nothing changes or gets better
    kept = {path.name for path in parsed.step_dir().glob("*.pth")}
    assert kept == {
        *("last.pth", "model_best.pth"),
        *("checkpoint-epoch2.pth", "checkpoint-epoch3.pth"),
    }
    assert torch.load(parsed.step_dir() / "model_best.pth", weights_only=True)["epoch"] == 1
    assert metrics(parsed.log_dir() / "val")["epoch"] == 3
    events = list(parsed.log_dir().glob("events.out.tfevents.*"))
    assert len(events) == 1
    content = events[0].read_bytes()
    for tag in (b"train/mbce", b"train/lr", b"val/Mean_Intersection", b"test/Pixel_Accuracy"):
        assert tag in content


@pytest.mark.parametrize("text", ["max", "best val_a", "val_a", "max val_b"])
def test_faulty_monitor(text):
    with pytest.raises(UserError, match="val_a"):
        parse_monitor(text, ["val_a"])


def test_validation_counts_only_new_classes(after_base):
    config, flags = after_base
    step1 = train(config, *flags, "--task_step", "1", "--freeze_bn", "--epochs", "1")
    confusion = np.array(metrics(step1.log_dir() / "val")["confusion"])
    assert confusion[1:16].sum() == 0
    assert confusion[16:].sum() > 0


def test_batch_size_of_evaluation_does_not_matter(after_base):
    config, flags = after_base
    first = train(config, *flags, "--test")
    eight = metrics(first.log_dir())
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"]["test"]["batch_size"] = 1
    other = config.with_name("one.json")
    other.write_text(json.dumps(tree))
    train(other, *flags, "--test")
    assert metrics(first.log_dir())["confusion"] == eight["confusion"]


def test_groups_of_the_first_validation(base):
    """As at every step: old = background, new = the classes of the step."""
    report = metrics(base[2].log_dir() / "val")
    iou = [row["IoU"] for row in report["classes"]]
    groups = report["metrics"]["Mean_Intersection_over_Union"]
    assert groups["old"] == iou[0]
    assert groups["new"] == pytest.approx(np.mean(iou[1:]))
    assert groups["overall"] == pytest.approx(np.mean(iou))
    assert "harmonic" in groups


@pytest.mark.parametrize("held_out", [False, True])
def test_choosing_on_test_images_is_told(toy_config, held_out):
    tree = json.loads(toy_config.read_text())
    tree["trainer"]["monitor"] = "max val_Mean_Intersection_over_Union_new"
    tree["data_loader"]["args"]["val"]["cross_val"] = held_out
    toy_config.write_text(json.dumps(tree))
    parsed = train(toy_config, "--epochs", "1")
    told = "set data_loader.args.val.cross_val" in (parsed.log_dir() / "info.log").read_text()
    assert told is not held_out


def test_a_result_names_its_run(toy_config):
    """The setting, the seed, the memory, the schedule: what reports compare."""
    flags = ("--task_setting", "sequential", "--seed", "9", "--mem_size", "7", "--name", "other")
    parsed = train(toy_config, *flags, "--epochs", "1")
    steps = [[*range(1, 16)], [*range(16, 21)]]
    expected = {"setting": "sequential", "seed": 9, "memory": 7, "name": "other", "epoch": 1}
    expected |= {"dataset": "voc", "task": "15-5", "step": 0, "steps": steps, "joint": False}
    expected |= {"method": "dkd", "precision": "float32", "device": "cpu"}
    for folder, split in ((parsed.log_dir(), "test"), (parsed.log_dir() / "val", "val")):
        report = metrics(folder)
        assert {key: report[key] for key in expected} == expected
        assert report["split"] == split
        assert ("wide" in report) is ("future_classes" in report) is (split == "test")


def test_batches_of_a_pass_before_the_step_know_their_iteration(toy_config, monkeypatch):
    seen = []

    def note(self, context):
        seen.extend(batch.iteration for batch in context.batches(0))
        raise KeyboardInterrupt

    monkeypatch.setattr(METHODS["dkd"], "begin_step", note)
    with pytest.raises(KeyboardInterrupt):
        train(toy_config, "--accumulate", "2", "--bs", "4")
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_seed_decides_the_weights_that_a_step_starts_with(toy_config, monkeypatch):
    started = []

    def note(self):
        started.append(torch.cat([p.detach().flatten() for p in self.student.parameters()]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", note)
    for seed in ("3", "3", "4"):
        with pytest.raises(KeyboardInterrupt):
            train(toy_config, "--seed", seed)
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_the_teacher_is_the_finished_step_in_eval_mode(after_base, monkeypatch):
    """Also where BatchNorm is trained and dropout is on."""
    config, flags = after_base
    seen = []
    step = Trainer.train_step

    def note(self, *args):
        seen.append((self.student.training, self.teacher))
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", note)
    late = ("--task_step", "1", "--no-freeze_bn", "--epochs", "1", "--bs", "4")
    train(config, *flags, *late, "--set", "fast.fold_bn=false")
    trained = files.load(Path(flags[1]) / "models/overlap_15-5_toy/step_0/checkpoint-epoch2.pth")
    assert seen
    for training, teacher in seen:
        assert training
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        state = teacher.state_dict()
        assert state.keys() == trained["state_dict"].keys()
        assert all(torch.equal(state[key], v) for key, v in trained["state_dict"].items())


def test_own_order_of_classes(toy_root, tmp_path):
    """Channels in order of arrival, reports in label ids."""
    steps = [[20, 3, 11, 1, 2, 4, 5, 6], [7, 8]]
    config = write_config(tmp_path / "own.json", toy_root, name="own", steps=steps)
    train(config, "--epochs", "1")
    parsed = train(config, "--epochs", "1", "--task_step", "1", "--freeze_bn")
    report = metrics(parsed.log_dir())
    assert [row["label_id"] for row in report["classes"]] == [0, *steps[0], *steps[1]]
    assert report["classes"][1]["name"] == "teal crescent"


def test_step_without_validation_images(toy_root, tmp_path):
    """A class that the val list lacks is no reason to lose the training."""
    root = tmp_path / "data"
    shutil.copytree(toy_root, root)
    lists = root / "ImageSets" / "Segmentation"
    held = (lists / "val.txt").read_text().splitlines()
    with_class_3 = [
        name
        for name in held
        if 3 in np.unique(np.array(Image.open(root / "SegmentationClass" / f"{name}.png")))
    ]
    (lists / "val.txt").write_text("\n".join(set(held) - set(with_class_3)))
    config = write_config(tmp_path / "c.json", root, name="own", steps=[[1, 2, 4], [3]])
    train(config, "--epochs", "1")
    step1 = train(config, "--epochs", "1", "--task_step", "1", "--freeze_bn", "--bs", "2")
    assert metrics(step1.log_dir() / "val")["images"] == 0
    assert metrics(step1.log_dir())["classes"][-1]["IoU"] == 0
    assert "no validation image" in (step1.log_dir() / "info.log").read_text()


def test_resuming_does_not_overwrite_another_run(after_base, tmp_path):
    """A finished run stays, also when -r names a checkpoint of another one or an older epoch."""
    config, flags = after_base
    folder = tmp_path / STEP_0
    shutil.copy(folder / "last.pth", tmp_path / "elsewhere.pth")
    with pytest.raises(UserError, match="already holds a run"):
        train(config, *flags, "-r", str(tmp_path / "elsewhere.pth"))
    with pytest.raises(UserError, match=r"is not where the run in .* stands"):
        train(config, *flags, "-r", str(folder / "checkpoint-epoch2.pth"))


def test_resuming_with_another_global_batch_or_fewer_epochs(after_base, tmp_path):
    """Both would bend the learning-rate schedule."""
    config, flags = after_base
    folder = tmp_path / STEP_0
    last = ["-r", str(folder / "last.pth")]
    with pytest.raises(UserError, match="global batch is 4 here and 8 there"):
        train(config, *flags, *last, "--bs", "4", "--epochs", "3")
    with pytest.raises(UserError, match="2 epochs behind it"):
        train(config, *flags, *last, "--epochs", "1")


def test_weights_named_by_hand_do_not_become_the_result_of_the_step(after_base, tmp_path):
    config, flags = after_base
    folder = tmp_path / STEP_0
    parsed = train(config, *flags, "--test", "-r", str(folder / "last.pth"))
    assert evaluation(parsed)["weights"].endswith("last.pth")
    checkpoint = torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)
    torch.save({**checkpoint, "finished": False}, folder / "checkpoint-epoch2.pth")
    with pytest.raises(UserError, match="holds no finished run"):
        train(config, *flags, "--test")


def test_linked_data_from_training_to_the_last_evaluation(toy_root, tmp_path):
    """As the scripts call both: the setting of the run holds for its own weights."""
    root = tmp_path / "linked"
    shutil.copytree(toy_root, root)
    (root / "JPEGImages").rename(tmp_path / "elsewhere")
    (root / "JPEGImages").symlink_to(tmp_path / "elsewhere")
    config = write_config(tmp_path / "c.json", root)
    with pytest.raises(UserError, match=r"is a link .*pass --follow_links"):
        train(config, "--epochs", "1", "--name", "without")
    trained = train(config, "--epochs", "1", "--follow_links")
    weights = ("--test", "-r", str(trained.step_dir() / "checkpoint-epoch1.pth"))
    saved = ("--save_dir", trained["trainer"]["save_dir"])
    evaluated = train(None, *weights, *saved, mode="eval")
    assert evaluation(evaluated)["confusion"] == metrics(trained.log_dir())["confusion"]
