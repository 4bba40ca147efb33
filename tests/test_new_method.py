"""A method from outside moves in: one class and one line in `METHODS`, here and nowhere else.
What else shows it, from recipes to the report, is tried in `test_moving_in.py`.

It asks all that the contract offers: softmax heads of another family, a stage map, a pass before
the step, a statistic over ranks that every iteration moves, state across steps, own settings.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from base import base_method
from base.base_method import BaseMethod, setting
from base.base_model import HeadPlan
from models.pixels import upsample
from tests.helpers import train, write_config
from trainer import methods
from trainer.plan import plan_run
from trainer.run import work
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.errors import UserError
from utils.labels import VOID
from utils.parse_config import ConfigParser
from utils.processes.launch import launch
from utils.processes.signals import Interrupted


class Statistics(BaseMethod):
    """Softmax over background and classes; keeps a stage map near the teacher's."""

    family = "background"
    learns_old = False
    dropout = False
    wants = frozenset({"stages"})

    @dataclass(frozen=True)
    class Settings(base_method.Settings):
        """Weights of the terms, and how the statistic moves."""

        ce: float = setting(1.0, "weight of the cross-entropy")
        keep: float = setting(10.0, "weight of the distance to the teacher's stage map")
        rate: float = setting(0.25, "share of a batch in the statistic", most=1)
        rule: str = setting("mean", "of the stage map", choices=("mean", "max"))
        rare: bool = setting(False, "weigh the rarer classes more")

    def __init__(self, task, given):
        super().__init__(task, given)
        self.statistic = torch.zeros(())
        self.counts, self.passes = torch.zeros(1 + len(task.seen)), 0
        self.earlier = {}

    def heads(self):
        return HeadPlan((1, *self.task.classes_per_step))

    def start(self, student, earlier):
        self.earlier = dict(earlier)
        if self.task.step > 0:
            with torch.no_grad():
                student.cls[-1].weight.copy_(
                    student.cls[0].weight.expand_as(student.cls[-1].weight)
                )

    def parameter_groups(self, student, lr, weight_decay):
        params = [p for p in student.parameters() if p.requires_grad]
        return [{"name": "all", "params": params, "lr": lr, "weight_decay": weight_decay}]

    def begin_step(self, context):
        assert not torch.is_grad_enabled()
        assert not context.student.training
        counts = torch.zeros_like(self.counts, device=self._device(context))
        for batch in context.batches(0):
            shown = batch.labels[batch.labels != VOID].long()
            counts += torch.bincount(shown, minlength=len(counts))
        self.counts, self.passes = context.total(counts), self.passes + 1

    def losses(self, batch, student, teacher, total):
        stage = student.stages[1].detach().float()
        seen = stage.amax((1, 2, 3)) if self.settings.rule == "max" else stage.mean((1, 2, 3))
        both = total(torch.stack([seen.sum(), seen.new_tensor(len(seen))]))
        # The number of the iteration is the same on all ranks and after a resume.
        now = both[0] / both[1] / (1 + batch.iteration)
        self.statistic = torch.lerp(self.statistic.to(now), now, self.settings.rate)
        logits = upsample(student.logits, batch.labels.shape[-2:])
        weight = 1 / (1 + self.counts.to(logits)) if self.settings.rare else None
        ce = F.cross_entropy(
            logits, batch.labels.long(), weight, ignore_index=VOID, reduction="none"
        )
        terms = {
            "ce": ce.mean()[None]
        }  # over all pixels: ranks have different numbers of void ones
        if teacher is not None:
            distance = (student.stages[1] - teacher.stages[1]).float().square().mean()
            terms["keep"] = (distance * (1 + self.statistic))[None]
        return terms

    def end_step(self, context):
        sizes = [len(batch.images) for batch in context.batches(context.epochs + 1)]
        self.passes += int(context.total(torch.tensor(float(sum(sizes)))))

    def predict(self, output, size=None):
        return upsample(output.logits, size or output.logits.shape[-2:]).argmax(1)

    def confident(self, output, size):
        scores, channels = upsample(output.logits, size).softmax(1)[:, 1:].max(1)
        return 1 + channels, scores

    def state(self):
        return {
            "statistic": self.statistic.cpu(),
            "counts": self.counts.cpu(),
            "passes": self.passes,
            "history": [*self.earlier.get("history", []), float(self.statistic)],
        }

    def load_state(self, state):
        self.statistic, self.counts = state["statistic"], state["counts"]
        self.passes = state["passes"]

    @staticmethod
    def _device(context):
        return next(context.student.parameters()).device


def work_with_it(job, ranks):
    """In a process of its own, which does not know the method yet."""
    methods.METHODS["statistics"] = Statistics
    work(job, ranks)


@pytest.fixture
def it(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "statistics", Statistics)


FLAGS = ("--method", "statistics", "--freeze_bn", "--epochs", "2", "--lr", "0.01")


@pytest.fixture
def config(toy_root, tmp_path):
    return write_config(tmp_path / "toy.json", toy_root)


def checkpoint(parsed):
    return files.load(parsed.step_dir() / "checkpoint-epoch2.pth")


def same(a, b):
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for name, value in a["method_state"].items():
        other = b["method_state"][name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


def test_it_trains_two_steps_and_hands_its_state_on(it, config):
    zero = train(config, *FLAGS)
    one = train(config, *FLAGS, "--task_step", "1")
    first, second = (checkpoint(run)["method_state"] for run in (zero, one))
    assert checkpoint(one)["family"] == "background"
    images = json.loads((one.log_dir() / "metrics.json").read_text())["images"]
    assert images > 0
    assert first["statistic"] != 0
    assert second["history"] == [*first["history"], float(second["statistic"])]
    for state in (first, second):
        # one pass before the step, and one after it over the images of whole batches
        assert state["passes"] > 8
        assert (state["passes"] - 1) % 8 == 0
    crop = 32 * 32
    assert 0 < first["counts"].sum() <= 48 * crop
    assert len(second["counts"]) == 21
    written = json.loads((one.step_dir() / "config.json").read_text())["hyperparameter"]
    assert written == {"ce": 1.0, "keep": 10.0, "rate": 0.25, "rule": "mean", "rare": False}


@pytest.mark.parametrize("step", [0, 1])
def test_it_is_stopped_and_goes_on_to_the_same_bits(it, config, tmp_path, monkeypatch, step):
    flags = (*FLAGS, "--task_step", str(step))
    if step:
        train(config, *FLAGS)
    whole = checkpoint(train(config, *flags))
    saved = tmp_path / "again"
    if step:
        (saved / "models/overlap_15-5_toy").mkdir(parents=True)
        shutil.copytree(
            tmp_path / "runs/models/overlap_15-5_toy/step_0",
            saved / "models/overlap_15-5_toy/step_0",
        )
    flags = (*flags, "--save_dir", str(saved))
    each, calls = Trainer.train_step, []

    def stop_in_the_second_epoch(self, *args, **kwargs):
        values = each(self, *args, **kwargs)
        calls.append(1)
        if self.iteration == 0 and len(calls) > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_in_the_second_epoch)
        with pytest.raises(Interrupted):
            train(config, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "begin_step", None)  # is not to be called again
        again = train(config, *flags, "-r", "auto")
    same(checkpoint(again), whole)


@pytest.mark.slow
def test_two_processes_are_one(it, config, tmp_path):
    """Frozen BatchNorm, no dropout: the same weights to rounding, the same sums over ranks."""
    one = checkpoint(train(config, *FLAGS))
    tree = json.loads(config.read_text())
    tree |= {"n_gpu": 2, "multiprocessing_distributed": True}
    tree["data_loader"]["args"]["train"]["batch_size"] = 4
    tree["trainer"]["save_dir"] = str(tmp_path / "two")
    config.write_text(json.dumps(tree))
    argv = ["-c", str(config), "-d", "cpu", *FLAGS]
    parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
    job = plan_run([parsed])
    launch(work_with_it, job, job.launch)
    two = checkpoint(parsed)
    assert two["method_state"]["passes"] == one["method_state"]["passes"]
    assert torch.equal(two["method_state"]["counts"], one["method_state"]["counts"])
    a, b = (float(c["method_state"]["statistic"]) for c in (one, two))
    np.testing.assert_allclose(b, a, atol=1e-4)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_replay_asks_it_for_pseudo_labels(it, toy_root, tmp_path):
    steps = [list(range(1, 16)), [16, 17], [18, 19, 20]]
    config = write_config(tmp_path / "m.json", toy_root, name="own", steps=steps)
    flags = ("--method", "statistics", "--freeze_bn", "--epochs", "1", "--bs", "4")
    for step in range(3):
        run = train(config, *flags, "--mem_size", "6", "--task_step", str(step))
    memory = json.loads((run.step_dir() / "memory.json").read_text())
    assert memory["step_2"]["memory_list"]


# -------------------------------------------------------------------------------------- wrong input
def test_a_step_of_another_family(it, config):
    zero = train(config, "--epochs", "1")
    ways = (
        "its channel 0 is an auxiliary head",
        "'statistics' needs the background class",
        "train step 0 with --method statistics",
        "of its family (ft, lwf, lwf_mc, ilt, mib, plop, sdr)",
        "--task_step 0 --method METHOD --base RUN/step_0",
    )
    with pytest.raises(UserError) as caught:
        train(config, *FLAGS, "--task_step", "1")
    assert "was trained by 'dkd'" in str(caught.value)
    for part in ways:
        assert part in str(caught.value)
    with pytest.raises(UserError) as caught:
        train(config, *FLAGS, "--name", "own", "--base", str(zero.step_dir()))
    for part in ("method is statistics here and dkd there", *ways):
        assert part in str(caught.value)


def test_a_base_step_of_the_same_family(it, config):
    """The refusal names the way; the way works."""
    zero = train(config, "--epochs", "1", "--method", "ft")
    base, own = ("--base", str(zero.step_dir())), ("--name", "own")
    with pytest.raises(UserError, match=r"is taken with --method ft; .* with --method statistics"):
        train(config, "--epochs", "1", "--method", "statistics", *own, *base)
    train(config, "--epochs", "1", "--method", "ft", *own, *base)
    one = train(config, *FLAGS, *own, "--task_step", "1")
    assert checkpoint(one)["method"] == "statistics"


def test_a_missing_recipe_is_told(it, config):
    run = train(config, *FLAGS)
    lines = (run.log_dir() / "info.log").read_text().splitlines()
    (line,) = [line for line in lines if "recipe:" in line]
    assert line.endswith(
        "recipe: none, for there is no configs/recipes/statistics_voc.json; what neither -c nor a "
        "flag gives is as in configs/config_voc.json"
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rate", 2, "hyperparameter.rate is 2, but must be a number >= 0 and <= 1"),
        ("rate", "much", "hyperparameter.rate is 'much', but must be a number"),
        ("keep", True, "hyperparameter.keep is True, but must be a number"),
        ("rule", "median", 'hyperparameter.rule is \'median\', but must be one of "mean", "max"'),
        ("rare", 1, "hyperparameter.rare is 1, but must be true or false"),
        ("rat", 1, "no setting of 'statistics' (did you mean 'rate'?); valid: ce, keep, rate"),
        ("kd", 1, "hyperparameter.kd is no setting of 'statistics', but of dkd"),
    ],
)
def test_wrong_settings(it, config, name, value, says):
    tree = json.loads(config.read_text()) | {"hyperparameter": {name: value}}
    config.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        train(config, *FLAGS)
    assert says in str(caught.value)


def test_settings_of_another_method_are_not_taken_over(it, config):
    """A file's settings are those of the method that it names; the shipped file names DKD."""
    tree = json.loads(config.read_text()) | {"method": "dkd", "hyperparameter": {"kd": 3}}
    config.write_text(json.dumps(tree))
    parsed = train(config, *FLAGS)
    assert parsed["method"] == "statistics"
    written = json.loads((parsed.step_dir() / "config.json").read_text())["hyperparameter"]
    assert "kd" not in written
    assert "pos_weight" not in written
