"""Joint training, the upper bound: a schedule's classes at once, in any schedule's groups."""

import json

import numpy as np
import pytest

from base.task import make_task
from data_loader.splits import select
from data_loader.voc import VOC
from tests.helpers import train, write_config
from trainer.run import run
from utils.errors import UserError
from utils.parse_config import ConfigParser

NAMES = tuple(f"class{i}" for i in range(21))


def joint(name, step, setting="overlap"):
    return make_task("voc", VOC.tables, NAMES, name=name, setting=setting, step=step, joint=True)


def apart(name, step, setting="overlap"):
    return make_task("voc", VOC.tables, NAMES, name=name, setting=setting, step=step)


def test_task():
    task = joint("15-1", 2)
    assert (task.step, task.old, task.seen) == (0, (), tuple(range(1, 18)))
    assert (task.classes_per_step, task.schedule_step) == ((17,), 2)
    assert task.base_channels == range(16), "the groups are the schedule's"
    assert task.steps[1:] == ((18,), (19,), (20,)), "what comes later stays hidden"
    assert not task.published
    assert joint("15-5", 1).steps == joint("15-1", 5).steps
    assert apart("15-1", 2).schedule_step == 2


@pytest.mark.parametrize("setting", ["overlap", "disjoint"])
def test_the_images_are_those_of_the_steps(setting):
    presence = np.random.default_rng(0).random((200, 21)) < 0.08
    for step in range(6):
        steps = [select(presence, apart("15-1", t, setting), "train") for t in range(step + 1)]
        chosen = select(presence, joint("15-1", step, setting), "train")
        assert np.array_equal(chosen, np.unique(np.concatenate(steps)))


@pytest.fixture(scope="module")
def runs(toy_root, tmp_path_factory):
    """A joint run of two classes, then of all, and the config."""
    folder = tmp_path_factory.mktemp("joint")
    config = write_config(folder / "c.json", toy_root)
    flags = ("--joint", "--method", "ft", "--epochs", "1", "--task_name", "19-1")
    return config, [train(config, *flags, "--task_step", step) for step in "01"]


def read(parsed):
    return json.loads((parsed.log_dir() / "metrics.json").read_text())


def test_a_run_of_each_step(runs):
    """Each starts from nothing, with one head, and reports in the schedule's groups."""
    _, (first, last) = runs
    assert last.run_folder.name == "overlap_19-1_toy-joint"
    assert len(read(first)["classes"]) == 20
    metrics = read(last)
    assert (metrics["step"], metrics["joint"], len(metrics["classes"])) == (1, True, 21)
    assert metrics["metrics"]["Mean_Intersection_over_Union"].keys() >= {"old", "new", "harmonic"}
    log = (last.log_dir() / "info.log").read_text()
    assert "step 1 of 0..1, joint: all its classes at once" in log
    assert "0 old and 20 new classes" in log
    assert "show 1-20" in log


def test_the_recipe_is_that_of_step_0():
    argv = ["--joint", "--method", "ft", "--task_step", "1"]
    parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
    assert parsed["optimizer"]["args"]["lr"] == 0.01
    assert parsed.global_batch == 24


def evaluate(config, weights, *flags):
    words = ["-c", str(config), "-r", str(weights), "-d", "cpu", *flags]
    parsed = ConfigParser.from_args("eval", "configs/config_voc.json", argv=words)
    run(parsed)
    return parsed


def test_seen_as_another_schedule(runs, tmp_path):
    """The same weights in the groups of 15-1: the same pixels, other means."""
    config, (first, last) = runs
    weights = last.step_dir() / "checkpoint-epoch1.pth"
    flags = ("--save_dir", str(tmp_path), "--task_name", "15-1", "--task_step", "5")
    parsed = evaluate(config, weights, *flags)
    (file,) = (parsed.log_dir() / "eval").glob("*/metrics.json")
    again, before = json.loads(file.read_text()), read(last)
    assert again["confusion"] == before["confusion"]
    groups = [m["metrics"]["Mean_Intersection_over_Union"] for m in (again, before)]
    assert groups[0]["overall"] == groups[1]["overall"]
    iou = [row["IoU"] for row in again["classes"]]
    assert groups[0]["old"] == pytest.approx(np.mean(iou[:16]))
    assert groups[0]["new"] == pytest.approx(np.mean(iou[16:]))
    with pytest.raises(UserError, match="has learnt the label ids"):
        evaluate(config, weights, "--task_name", "15-1", "--task_step", "4")
    assert first.step_dir() != last.step_dir()
