"""`trainer.keep`: what lies on the disk after a step, and what later calls make of what is gone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.helpers import train, write_config
from utils import checkpoint as files
from utils.checkpoint_form import TRAINING_STATE
from utils.errors import UserError
from utils.run_folder import REMOVED

STEPS = [list(range(1, 16)), [16, 17], [18, 19, 20]]
FLAGS = ("-r", "auto", "--epochs", "2", "--bs", "4", "--task_step", "all")
FINAL = "checkpoint-epoch2.pth"


def keep(what: str) -> tuple[str, str]:
    return "--set", f"trainer.keep={what}"


@pytest.fixture(scope="module")
def runs(toy_root, tmp_path_factory):
    """A run of three steps for each value."""
    folder = tmp_path_factory.mktemp("kept")
    config = write_config(folder / "c.json", toy_root, name="own", steps=STEPS)
    return config, {
        what: train(config, *FLAGS, "--name", what, *keep(what))
        for what in ("all", "weights", "last")
    }


@pytest.fixture
def last(runs, tmp_path):
    """A copy of the run that keeps the last weights, and the flags that call it again."""
    config, parsed = runs[0], runs[1]["last"]
    shutil.copytree(parsed["trainer"]["save_dir"], tmp_path / "runs")
    flags = (*FLAGS, "--name", "last", *keep("last"), "--save_dir", str(tmp_path / "runs"))
    return config, flags, lambda step: tmp_path / "runs/models/overlap_own_last" / f"step_{step}"


def weights_in(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_a_finished_step_holds_what_was_asked_for(runs):
    for step in range(3):
        states = {what: files.load(run.step_dir(step) / FINAL) for what, run in runs[1].items()
                  if (run.step_dir(step) / FINAL).is_file()}  # fmt: skip
        assert states.keys() == {"all", "weights"} | ({"last"} if step != 1 else set())
        assert states["all"].keys() >= TRAINING_STATE
        for what in states.keys() - {"all"}:
            assert states[what].keys() == states["all"].keys() - TRAINING_STATE
            for name, value in states["all"]["state_dict"].items():
                assert torch.equal(states[what]["state_dict"][name], value), (what, step, name)
        for what in states:
            assert weights_in(runs[1][what].step_dir(step)) == [FINAL, files.LAST]


def test_checkpoints_on_the_way_lose_their_state_at_the_end(runs, tmp_path):
    flags = (
        "--set",
        "trainer.save_period=1",
        "--set",
        "trainer.monitor=max val_Mean_Intersection_over_Union_overall",
    )
    flags += ("--set", "trainer.validation_period=1", "--save_dir", str(tmp_path), "--epochs", "2")
    parsed = train(runs[0], "--bs", "4", *flags, *keep("weights"))
    names = ["checkpoint-epoch1.pth", FINAL, files.LAST, files.BEST]
    assert weights_in(parsed.step_dir()) == sorted(names)
    for name in names:
        assert not TRAINING_STATE & files.load(parsed.step_dir() / name).keys(), name


def test_a_step_that_is_kept_whole_can_be_lengthened_and_no_other(runs, tmp_path):
    config, parsed = runs
    for what in ("all", "weights"):
        folder = tmp_path / "models" / parsed[what].run_folder.name / "step_0"
        shutil.copytree(parsed[what].step_dir(0), folder)
        flags = ("-r", str(folder / files.LAST), "--name", what, "--save_dir", str(tmp_path))
        flags += ("--bs", "4", "--epochs", "3")
        if what == "all":
            train(config, *flags, *keep(what))
            assert files.load(folder / "checkpoint-epoch3.pth")["epoch"] == 3
            continue
        with pytest.raises(UserError, match=r"trainer\.keep kept the weights alone"):
            train(config, *flags)
        with pytest.raises(UserError) as error:
            train(config, *FLAGS, "--name", what, "--save_dir", str(tmp_path), "--epochs", "3")
        assert "lengthens" not in str(error.value)


def test_a_step_without_its_weights_is_finished(last, capsys):
    config, flags, folder = last
    assert weights_in(folder(1)) == []
    capsys.readouterr()
    train(config, *flags)
    assert capsys.readouterr().out.count("nothing to do") == 3
    with pytest.raises(UserError, match=r"step_1 holds a finished step of another run: .*lr"):
        train(config, *flags, "--task_step", "1", "--lr", "0.5")
    with pytest.raises(UserError, match="step_1 were removed"):
        train(config, *flags[2:], "--task_step", "1", "--test")
    with pytest.raises(UserError, match="already holds a run"):
        train(config, *flags[2:], "--task_step", "1")
    shutil.rmtree(folder(2))
    with pytest.raises(UserError, match=r"weights of that were removed from .*step_1"):
        train(config, *flags)


def test_weights_of_a_removed_step_are_still_compared(last):
    config, flags, folder = last
    file = folder(1) / REMOVED
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"weights": "0" * 64}))
    with pytest.raises(UserError, match=r"were removed .*does not tell their result"):
        train(config, *flags)
    log = folder(1).parents[2] / "log/overlap_own_last/step_1/metrics.json"
    result = json.loads(log.read_text())
    log.write_text(json.dumps(result | {"weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match="trained from other weights of step 1"):
        train(config, *flags)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights": 3}', '{"record": {"settings": []}}'])
def test_damage_of_what_is_known_is_one_sentence(last, text):
    config, flags, folder = last
    (folder(1) / REMOVED).write_text(text)
    with pytest.raises(UserError, match=REMOVED):
        train(config, *flags)
