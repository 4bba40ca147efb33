"""What TensorBoard gets of a run, and that the run is the same with it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import train, write_config
from trainer.evaluation import Evaluation
from trainer.tensorboard import TensorBoard
from utils import checkpoint as files
from utils.ranks import Ranks

FLAGS = ("--epochs", "2", "--set", "trainer.validation_period=1")


def run(root, folder, tensorboard):
    folder.mkdir()
    config = write_config(folder / "toy.json", root)
    return train(config, *FLAGS, "--set", f"trainer.tensorboard={json.dumps(tensorboard)}")


@pytest.fixture(scope="module")
def told(toy_root, tmp_path_factory):
    """A run with events, and these."""
    parsed = run(toy_root, tmp_path_factory.mktemp("events") / "on", True)
    events = EventAccumulator(str(parsed.log_dir()))
    events.Reload()
    return parsed, events


def test_rate_terms_and_metrics_are_scalars(told):
    tags = set(told[1].Tags()["scalars"])
    assert {"train/lr", "train/loss", "train/mbce", "train/ac"} <= tags
    means = "Mean_Intersection_over_Union_overall"
    assert {f"val/{means}", f"test/{means}", "val/Pixel_Accuracy_new"} <= tags
    assert [event.step for event in told[1].Scalars(f"val/{means}")] == [1, 2]
    steps = [event.step for event in told[1].Scalars("train/lr")]
    assert steps == list(range(1, len(steps) + 1))


def test_the_config_is_a_text_told_once(told):
    parsed, events = told
    (event,) = events.Tensors("config/text_summary")
    (text,) = event.tensor_proto.string_val
    start, *lines, end = text.decode().splitlines()
    assert start == end == "```"
    assert json.loads("\n".join(lines)) == parsed.as_dict()
    assert lines[1].startswith('    "')


def test_every_validation_has_a_picture_of_four_images(told):
    events = told[1].Images("val/examples")
    assert [event.step for event in events] == [1, 2]
    assert events[0].width == 3 * (192 + 6) + 6
    assert 4 * (192 + 6) < events[0].height < 5 * (192 + 6) + 100


def test_a_run_has_the_same_bits_without_events(told, toy_root, tmp_path, monkeypatch):
    """Nothing of TensorBoard is imported then, and no picture computed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(Evaluation, "examples", None)
    silent = run(toy_root, tmp_path / "off", False)
    assert not list(silent.log_dir().glob("events*"))
    one, other = (files.load(parsed.step_dir() / "last.pth") for parsed in (told[0], silent))
    assert torch.equal(one["rng"][0]["torch"], other["rng"][0]["torch"])
    weights, others = one["state_dict"], other["state_dict"]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_only_the_first_rank_writes(told):
    cpu = torch.device("cpu")
    assert TensorBoard(told[0], Ranks(0, 2, cpu)).on
    assert not TensorBoard(told[0], Ranks(1, 2, cpu)).on


def test_a_resumed_run_tells_what_follows_in_a_file_of_its_own(told, toy_root, tmp_path):
    parsed = run(toy_root, tmp_path / "on", True)
    config = Path(parsed["trainer"]["save_dir"]).parent / "toy.json"
    last = str(parsed.step_dir() / "last.pth")
    train(config, *FLAGS[2:], "--epochs", "3", "--set", "trainer.tensorboard=true", "-r", last)
    events = EventAccumulator(str(parsed.log_dir()))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/lr")]
    assert steps == list(range(1, len(steps) + 1))
    assert [event.step for event in events.Images("val/examples")] == [1, 2, 3]
