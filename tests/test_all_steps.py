"""`--task_step all` and ranges: a whole task in one launch, each step as if called alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import PROJECT, after, send, train, write_config
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.errors import UserError
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted

STEPS = [list(range(1, 16)), [16, 17], [18, 19, 20]]
FLAGS = ("--epochs", "2", "--mem_size", "6", "--bs", "4", "--lr", "0.001")


@pytest.fixture(scope="module")
def alone(toy_root, tmp_path_factory):
    """A config, and the three steps called one by one."""
    config = write_config(
        tmp_path_factory.mktemp("alone") / "c.json", toy_root, name="own", steps=STEPS
    )
    return config, [train(config, *FLAGS, "--task_step", str(step)) for step in range(3)]


@pytest.fixture
def elsewhere(tmp_path):
    return ("--save_dir", str(tmp_path / "runs"))


def assert_as_alone(parsed, alone, *, rounding=False):
    for step, run in enumerate(alone):
        name = "checkpoint-epoch2.pth"
        a, b = files.load(parsed.step_dir(step) / name), files.load(run.step_dir() / name)
        assert a["record"] == b["record"]
        for key, value in b["state_dict"].items():
            if rounding:
                torch.testing.assert_close(a["state_dict"][key], value, rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(a["state_dict"][key], value), (step, key)
        if not rounding:
            mine, theirs = (
                json.loads((where / "metrics.json").read_text())["confusion"]
                for where in (parsed.log_dir(step), run.log_dir())
            )
            assert mine == theirs
            memory = [where / "memory.json" for where in (parsed.step_dir(step), run.step_dir())]
            assert memory[0].exists() == memory[1].exists() == (step > 0)
            assert step == 0 or memory[0].read_bytes() == memory[1].read_bytes()


def test_all_steps_are_those_called_alone(alone, elsewhere, capsys, monkeypatch):
    config, runs = alone
    parsed = train(config, *FLAGS, "--task_step", "all", *elsewhere)
    assert_as_alone(parsed, runs)
    for step in range(3):
        log = (parsed.log_dir(step) / "info.log").read_text()
        assert f"step {step} of 0..2" in log
        assert log.count("leakage audit") == 1
    capsys.readouterr()
    monkeypatch.setattr("trainer.run.launch", None)  # is not to be called for what is finished
    read, load = [], files.load
    monkeypatch.setattr(files, "load", lambda path: read.append(path) or load(path))
    train(config, *FLAGS, "--task_step", "all", *elsewhere)
    assert capsys.readouterr().out.count("is finished, see") == 3
    assert [path.parent.name for path in read] == ["step_0", "step_1", "step_2"], "each one once"


def test_a_range_goes_on_where_a_step_was_stopped(alone, elsewhere, monkeypatch):
    config, runs = alone
    flags = (*FLAGS, "--task_step", "0-1", *elsewhere)
    each = Trainer.train_step

    def stop(self, *args, **kwargs):
        values = each(self, *args, **kwargs)
        if self.task.step == 1 and self.epoch == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(Interrupted, match="continue with -r auto"):
            train(config, *flags)
    parsed = train(config, *flags)
    assert not parsed.step_dir(2).exists()
    train(config, *FLAGS, "--task_step", "2-2", *elsewhere)
    assert_as_alone(parsed, runs)


@pytest.fixture
def read(monkeypatch):
    """Names of the checkpoints that are read as a whole, which mostly takes a second each."""
    names, load = [], files.load
    monkeypatch.setattr(files, "load", lambda path: names.append(path.name) or load(path))
    return names


@pytest.mark.parametrize("resume", ["auto", "file"])
def test_each_checkpoint_is_read_once(resume, alone, elsewhere, tmp_path, monkeypatch, read):
    """Going on in a later step: its own checkpoint and the previous step's, nothing twice."""
    config, runs = alone
    folder = tmp_path / "runs/models" / runs[0].run_folder.name
    shutil.copytree(runs[0].step_dir(), folder / "step_0")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", after(1, Trainer.train_step, send(signal.SIGTERM)))
        with pytest.raises(Interrupted):
            train(config, *FLAGS, "--task_step", "1", *elsewhere)
    read.clear()
    where = "auto" if resume == "auto" else str(folder / "step_1/last.pth")
    train(config, *FLAGS, "--task_step", "1", "-r", where, *elsewhere)
    assert sorted(read) == ["checkpoint-epoch2.pth", "last.pth"]


def test_the_checkpoint_of_a_finished_step_is_read_once(alone, elsewhere, tmp_path, read):
    """Whatever it is called: to test it, and to take it over and test it."""
    config, runs = alone
    folder = tmp_path / "runs/models" / runs[0].run_folder.name
    train(config, *FLAGS, "--task_step", "0", "--base", str(runs[0].step_dir()), *elsewhere)
    assert read == ["checkpoint-epoch2.pth"]
    os.link(folder / "step_0/checkpoint-epoch2.pth", folder / "step_0/last.pth")
    (tmp_path / "runs/log" / runs[0].run_folder.name / "step_0/metrics.json").unlink()
    read.clear()
    train(config, *FLAGS, "--task_step", "0", "-r", "auto", *elsewhere)
    assert read == ["last.pth"]


@pytest.mark.slow
def test_two_processes_train_a_whole_task(alone, tmp_path):
    """One launch, with the recipe's frozen BatchNorm from step 1 on."""
    config, runs = alone
    tree = json.loads(config.read_text())
    tree |= {"n_gpu": 2, "multiprocessing_distributed": True}
    tree["trainer"]["save_dir"] = str(tmp_path / "two")
    two = tmp_path / "two.json"
    two.write_text(json.dumps(tree))
    folder = tmp_path / "two/models" / runs[0].run_folder.name
    shutil.copytree(runs[0].step_dir(), folder / "step_0")
    flags = ("--epochs", "2", "--mem_size", "6", "--bs", "2", "--lr", "0.001")
    parsed = train(two, *flags, "--task_step", "1-2")
    assert_as_alone(parsed, runs, rounding=True)


def test_a_later_step_that_cannot_start_is_told_before_it_does(alone, elsewhere):
    config, _ = alone
    with pytest.raises(UserError, match=r"step 1 continues from step 0, but .* holds no"):
        train(config, *FLAGS, "--task_step", "1-2", *elsewhere)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("images", "no image of .* belongs to the train set of step 2 of task 'own'"),
        ("batch", r"the training set of step 1 has \d+ images, fewer than one batch"),
        ("settings", "step_2 holds a finished step of another run: seed is 1 here and 9 there"),
        ("room", r"MiB left, but the checkpoints of the later steps need \d+ MiB"),
    ],
)
def test_every_step_is_looked_at_before_the_first_is_trained(
    alone, elsewhere, toy_root, tmp_path, monkeypatch, change, says
):
    config, runs = alone
    flags = [*FLAGS, *elsewhere]
    if change == "images":  # the training masks lose the classes of the last step
        shutil.copytree(toy_root, tmp_path / "voc")
        for path in (tmp_path / "voc/SegmentationClassAug").iterdir():
            mask = np.array(Image.open(path))
            mask[(mask >= 18) & (mask <= 20)] = 0
            Image.fromarray(mask).save(path)
        flags += ["--data_dir", str(tmp_path / "voc")]
    if change == "batch":
        flags += ["--bs", "20", "--mem_size", "0"]
    if change == "settings":
        folder = tmp_path / "runs/models" / runs[0].run_folder.name / "step_2"
        shutil.copytree(runs[2].step_dir(), folder)
        for path in folder.glob("*.pth"):
            checkpoint = files.load(path)
            checkpoint["record"]["settings"]["seed"] = 9
            torch.save(checkpoint, path)
    if change == "room":
        free = type(shutil.disk_usage(tmp_path))(10**9, 0, 5 * 10**7)
        monkeypatch.setattr("trainer.folders.shutil.disk_usage", lambda _: free)
        size = lambda config, _, **__: 10**8 * config["data_loader"]["args"]["task"]["step"]  # noqa: E731
        monkeypatch.setattr("trainer.plan.checkpoint_size", size)
    monkeypatch.setattr("trainer.run.launch", None)  # nothing is trained
    with pytest.raises(UserError, match=says):
        train(config, *flags, "--task_step", "all")
    assert not (tmp_path / "runs/models" / runs[0].run_folder.name / "step_0").exists()


def test_a_signal_in_the_preparation_of_a_later_step_stops_at_once(alone, elsewhere, monkeypatch):
    """Not after it, and not after an iteration."""
    config, _ = alone

    def strike(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr("trainer.run.load_previous", strike)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        train(config, *FLAGS, "--task_step", "0-1", *elsewhere)
    parsed = ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(config), *elsewhere]
    )
    assert files.load(parsed.step_dir(0) / "last.pth")["finished"]
    assert not list(parsed.step_dir(1).glob("*.pth"))


@pytest.mark.parametrize("step", ["1", "all"])
def test_another_schedule_of_the_same_name_is_not_finished(alone, tmp_path, step):
    """Same number of classes and images: only which classes they are tells them apart."""
    config, _ = alone
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"]["task"]["steps"] = [STEPS[0], [16, 18], [17, 19, 20]]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tree))
    line = (other, *FLAGS, "--task_step", step, *(("-r", "auto") if step == "1" else ()))
    with pytest.raises(UserError, match=r"classes is .*16, 18.* here and .*16, 17.* there"):
        train(*line)


@pytest.mark.parametrize(
    "flags",
    [("--bs", "8"), ("--set", "trainer.accumulate=2"), ("--set", "optimizer.args.momentum=0.5")],
    ids=" ".join,
)
def test_other_settings_are_not_finished(alone, flags):
    config, _ = alone
    with pytest.raises(UserError, match=r"holds a finished step of another run: .* here and"):
        train(config, *FLAGS, "--task_step", "all", *flags)


def test_finished_steps_of_another_seed(alone):
    config, _ = alone
    told = "holds a finished step of another run: seed is 9 here and 1 there"
    with pytest.raises(UserError, match=told):
        train(config, *FLAGS, "--task_step", "all", "--seed", "9")


# ----------------------------------------------------------------------------------------- recipes
def parsed_with(*argv, dataset="voc"):
    return ConfigParser.from_args("train", f"configs/config_{dataset}.json", argv=argv)


# data set → learning rate, positives' weight and frozen BatchNorm at step 0 and later
PUBLISHED = {
    "voc": ((0.001, 2, False, 60, 32), (0.0001, 1, True, 60, 32)),
    "ade": ((0.0025, 35, False, 100, 24), (0.00025, 35, True, 100, 24)),
}


@pytest.mark.parametrize("method", ["dkd", "finetune"])
@pytest.mark.parametrize("dataset", PUBLISHED)
@pytest.mark.parametrize("step", [0, 1])
def test_a_method_trains_by_its_recipe(method, dataset, step):
    """The values of the published scripts, without any hyper-parameter on the command line."""
    task = {"voc": "15-1", "ade": "100-10"}[dataset]
    config = parsed_with(
        "--method", method, "--task_name", task, "--task_step", str(step), dataset=dataset
    )
    found = (
        config["optimizer"]["args"]["lr"],
        config["hyperparameter"]["pos_weight"],
        config["arch"]["args"]["freeze_all_bn"],
        config["trainer"]["epochs"],
        config.global_batch,
    )
    assert found == PUBLISHED[dataset][step]
    (note,) = [note for note in config.notes if note.startswith("recipe: ")]
    assert f"recipes/{method}_{dataset}.json: " in note
    assert f"optimizer.args.lr {found[0]}" in note


@pytest.mark.parametrize(
    ("method", "task", "key", "first", "later"),
    [
        ("mib", "15-1", "hyperparameter.kd", None, 100),
        ("mib", "10-1", "hyperparameter.kd", None, 100),
        ("mib", "15-5", "hyperparameter.kd", None, 10),
        ("mib", "19-1", "hyperparameter.kd", None, 10),
        ("plop", "10-1", "trainer.epochs", 30, 10),
        ("plop", "15-1", "trainer.epochs", 30, 30),
    ],
)
def test_what_a_recipe_says_of_a_task_beats_its_other_blocks(method, task, key, first, later):
    for step in (0, 1):
        flags = ("--method", method, "--task_name", task, "--task_step", str(step))
        found = parsed_with(*flags).flat()
        assert found.get(key) == (later if step else first), step


def test_blocks_of_a_recipe_in_their_order(tmp_path, monkeypatch):
    """every_step, then those of the step; those of the task after all of them."""
    from utils import recipe

    def block(**values):
        return {"trainer": {"epochs": 1}, "hyperparameter": values}

    tree = {
        "source": "a test",
        "global_batch": 8,
        "later_steps": block(a=2, b=2, c=2, d=2),
        "every_step": block(a=1, b=1, c=1, d=1, e=1),
        "step_0": block(a=9, b=9, c=9, d=9),
        "tasks": {
            "15-1": {"later_steps": block(c=4), "every_step": block(b=3, c=3)},
            "15-5": {"every_step": block(d=9)},
        },
    }
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    monkeypatch.setattr(recipe, "PROJECT_ROOT", tmp_path)
    (tmp_path / "dkd_voc.json").write_text(json.dumps(tree))
    later, first = (recipe.read("dkd", "voc", "15-1", step).values for step in (2, 0))
    names = [f"hyperparameter.{name}" for name in "abcde"]
    assert [later[name] for name in names] == [2, 3, 4, 2, 1]
    assert [first[name] for name in names] == [9, 3, 3, 9, 1]


def test_what_the_user_says_beats_the_recipe(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"optimizer": {"args": {"lr": 0.5}}, "trainer": {"epochs": 7}}))
    config = parsed_with("-c", str(file), "--task_step", "1", "--epochs", "3", "--bs", "6")
    assert config["optimizer"]["args"]["lr"] == 0.5
    assert config["trainer"]["epochs"] == 3
    assert config["arch"]["args"]["freeze_all_bn"] is True, "the recipe's, for nobody said another"
    assert config.global_batch is None, "the user chose the batch"
    (note,) = [note for note in config.notes if note.startswith("recipe: ")]
    assert "trainer.epochs" not in note
    assert "optimizer.args.lr" not in note


def test_published_command_lines_keep_their_meaning():
    """With the published file, what is not typed is the file's, whatever a recipe says."""
    shipped = str(PROJECT / "configs/config_voc.json")
    config = parsed_with("-c", shipped, "--task_step", "1", "--lr", "0.0001", "--bs", "8")
    assert config["arch"]["args"]["freeze_all_bn"] is False
    assert config["hyperparameter"]["pos_weight"] == 1
    assert config["data_loader"]["args"]["train"]["batch_size"] == 8


def test_a_config_beside_weights_has_no_recipe(tmp_path):
    (tmp_path / "w.pth").touch()
    (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"args": {"lr": 0.7}}}))
    config = parsed_with("-r", str(tmp_path / "w.pth"), "--task_step", "1")
    assert config.recipe is None
    assert config["optimizer"]["args"]["lr"] == 0.7
    assert config["arch"]["args"]["freeze_all_bn"] is False


@pytest.mark.slow
def test_help_of_a_method_lists_its_settings():
    command = [sys.executable, "train_voc.py", "--method", "dkd", "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "  kd          weight of L_kd, the old classes' logits, a number >= 0\n" in done.stdout
    command = [sys.executable, "train_voc.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "--method NAME --help" in done.stdout


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/recipes").glob("*.json")), ids=str)
def test_shipped_recipes_are_good(path):
    """Of every method, task and step: keys, values and settings pass the checks of a run."""
    from data_loader import DATA_SETS
    from trainer.methods import METHODS
    from utils import recipe

    method, dataset = path.stem.rsplit("_", 1)
    (raw,) = [raw for raw in DATA_SETS.values() if raw.name == dataset]
    for task, steps in raw.tables.items():
        for step in range(len(steps)):
            found = recipe.read(method, dataset, task, step)
            given = {
                key.removeprefix("hyperparameter."): value
                for key, value in found.values.items()
                if key.startswith("hyperparameter.")
            }
            METHODS[method].Settings.read(given)
            assert found.values["optimizer.args.lr"] > 0
            assert found.global_batch > 1
    assert json.loads(path.read_text())["source"]
