"""The frame around the training loop, with epochs that do nothing: when it validates and saves."""

import pytest
import torch

from base.base_trainer import BaseTrainer
from utils import checkpoint as files
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.ranks import SINGLE


class Frame(BaseTrainer):
    """Notes what it is asked for; `values` are those of its validations, by epoch."""

    def __init__(self, config, values=None, stop=None):
        super().__init__(config, SINGLE, ["val_a"])
        self.values, self.stop, self.calls = values or {}, stop, []

    def begin_step(self):
        self.calls.append("begin")

    def end_step(self):
        self.calls.append("end")

    def train_epoch(self, epoch):
        while self.iteration < 3:
            self.iteration += 1
            self.calls.append((epoch, self.iteration))
            if (epoch, self.iteration) == self.stop:
                raise Interrupted("stopped by SIGTERM.")

    def validate(self, epoch):
        self.calls.append(f"val {epoch}")
        return {"val_a": self.values.get(epoch, 0)}

    def state(self):
        return {
            "state_dict": {"w": torch.ones(1)},
            "optimizer": {"state": {}, "param_groups": []},
            "rng": [],
            "record": {"version": "", "code": "", "torch": "", "settings": {}},
            "task": {"dataset": "", "name": "", "setting": "", "step": 0, "steps": []},
            "method": "",
            "family": "",
            "method_state": {},
            "lr_scheduler": {"last_epoch": 0},
            "scaler": {},
        }

    def load_state(self, checkpoint, path):
        self.calls.append("load")


@pytest.fixture
def configure(tmp_path):
    """A function: a config whose block `trainer` has these values."""

    def make(**trainer):
        settings = {"epochs": 5, "save_dir": str(tmp_path), "keep": "all"} | trainer
        flags = [f"--set=trainer.{key}={value}" for key, value in settings.items()]
        config = ConfigParser.from_args("train", "configs/config_voc.json", argv=flags)
        config.step_dir().mkdir(parents=True, exist_ok=True)
        return config

    return make


def kept(config):
    """Epoch by name of the checkpoint."""
    return {path.stem: files.load(path)["epoch"] for path in config.step_dir().glob("*.pth")}


@pytest.mark.parametrize(
    ("validation", "save", "validated", "saved"),
    [(-1, -1, [5], [5]), (2, 3, [2, 4, 5], [3, 5]), (1, 1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])],
)
def test_when_it_validates_and_saves(configure, validation, save, validated, saved):
    config = configure(validation_period=validation, save_period=save)
    frame = Frame(config)
    frame.train()
    assert [call for call in frame.calls if "val" in call] == [f"val {e}" for e in validated]
    assert (frame.calls[0], frame.calls[-1]) == ("begin", "end")
    assert frame.calls.count("begin") == frame.calls.count("end") == 1
    assert kept(config) == {"last": 5} | {f"checkpoint-epoch{epoch}": epoch for epoch in saved}
    assert [files.load(config.step_dir() / f"{name}.pth")["finished"] for name in kept(config)] == [
        epoch == 5 for epoch in kept(config).values()
    ]


@pytest.mark.parametrize(
    ("monitor", "values", "best", "last"),
    [
        ("max val_a", {1: 1, 2: 3, 3: 2, 4: 2.5, 5: 9}, 2, 4),
        ("min val_a", {1: 5, 2: 3, 3: 4, 4: 3, 5: 1}, 2, 4),
        ("max val_a", {1: 3, 2: 1, 3: 4, 4: 1, 5: 5}, 5, 5),
        ("min val_a", {1: 3, 2: 4, 3: 2, 4: 3, 5: 1}, 5, 5),
        ("off", {1: 3, 2: 2, 3: 1, 4: 0}, None, 5),
    ],
)
def test_the_best_and_when_to_stop(configure, monitor, values, best, last):
    """Two validations in a row without a better one end the step; an equal one is no better."""
    config = configure(monitor=monitor, early_stop=2, validation_period=1)
    frame = Frame(config, values)
    frame.train()
    found = kept(config)
    assert (found.get("model_best"), found["last"], frame.epoch) == (best, last, last)
    assert found[f"checkpoint-epoch{last}"] == last
    assert files.load(config.step_dir() / "last.pth")["finished"]
    assert frame.calls[-1] == "end"


@pytest.mark.parametrize(
    ("reset", "best", "last"), [("false", 1, 3), ("true", 3, 5)], ids=["remembered", "forgotten"]
)
def test_the_best_so_far_of_a_run_that_goes_on(configure, reset, best, last):
    """Epochs 2 and 3 are no better than 1, and 3 is the best of those after the stop."""
    values = {1: 9, 2: 2, 3: 3, 4: 1, 5: 1}
    settings = {"monitor": "max val_a", "early_stop": 2, "validation_period": 1}
    with pytest.raises(Interrupted, match="Epoch 2 is done and iteration 2 of the next"):
        Frame(configure(**settings), values, stop=(3, 2)).train()
    config = configure(**settings, reset_best_mnt=reset)
    frame = Frame(config, values)
    frame.resume(files.StoredCheckpoint(config.step_dir() / "last.pth"))
    frame.train()
    assert frame.calls[:3] == ["load", (3, 3), "val 3"]
    assert "begin" not in frame.calls
    found = kept(config)
    assert (found["model_best"], found["last"]) == (best, last)


def test_a_stalled_run_does_not_go_on(configure):
    """Stopped in the test that followed."""
    settings = {"monitor": "max val_a", "early_stop": 1, "validation_period": 1}
    Frame(configure(**settings), {1: 2, 2: 1}).train()
    config = configure(**settings)
    again = Frame(config)
    again.resume(files.StoredCheckpoint(config.step_dir() / "last.pth"))
    again.train()
    assert (again.calls, again.epoch) == (["load"], 2)


@pytest.mark.parametrize("stop", [(1, 1), (1, 3)])
def test_what_precedes_the_first_epoch_is_done_once(configure, stop):
    with pytest.raises(Interrupted, match=f"Epoch 0 is done and iteration {stop[1]} of"):
        Frame(configure(), stop=stop).train()
    config = configure()
    frame = Frame(config)
    frame.resume(files.StoredCheckpoint(config.step_dir() / "last.pth"))
    frame.train()
    assert "begin" not in frame.calls
    done = [call for call in frame.calls if isinstance(call, tuple)]
    assert done == [(e, i) for e in range(1, 6) for i in range(1, 4) if (e, i) > stop]
    assert files.load(config.step_dir() / "last.pth")["iteration"] == 0
