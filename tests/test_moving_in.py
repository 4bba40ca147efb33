"""What the README promises to who adds a method, done to a copy of the project: a method is
one file, one line, one recipe and one test, and all else works with it as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import PROJECT, write_config

METHOD = '''\
"""MAS: Memory Aware Synapses (ECCV 2018), for the softmax family."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from base.base_method import setting
from models.fast.losses import cross_entropy
from trainer.methods.background import BackgroundMethod


class MAS(BackgroundMethod):
    """Cross-entropy, and weights that mattered stay where they were."""

    label = "MAS"
    learns_old = True
    needs_teacher = False

    @dataclass(frozen=True)
    class Settings(BackgroundMethod.Settings):
        """Weights of the terms."""

        ce: float = setting(1.0, "weight of the cross-entropy")
        stay: float = setting(0.5, "weight of the squared distance of weights, by importance")

    def __init__(self, task, given):
        super().__init__(task, given)
        self.importance: dict[str, torch.Tensor] = {}

    def start(self, student, earlier):
        self.importance = dict(earlier.get("importance", {}))
        self.parameters = dict(student.named_parameters())
        self.before = {
            name: self.parameters[name].detach().clone() for name in self.importance
        }

    def losses(self, batch, student, teacher, total):
        terms = {"ce": cross_entropy(student.logits, self.labels(batch))}
        if self.task.step > 0 and self.importance:
            terms["stay"] = sum(
                (weight.to(now.device) * (now - self.before[name].to(now.device)).square()).sum()
                for name, weight in self.importance.items()
                for now in [self.parameters[name]]
            )[None]
        return terms

    def end_step(self, context):
        for name, value in context.student.named_parameters():
            self.importance[name] = value.detach().abs().cpu()

    def state(self):
        return {"importance": self.importance}

    def load_state(self, state):
        self.importance = dict(state["importance"])
'''
LINES = {
    "from trainer.methods.mib import MiB\n": "from trainer.methods.mas import MAS\n",
    '    "ssul": SSUL,\n': '    "mas": MAS,\n',
}
RECIPE = {
    "source": "of this test",
    "global_batch": 8,
    "every_step": {"hyperparameter": {"ce": 1}},
    "step_0": {"optimizer": {"args": {"lr": 0.05}}},
    "later_steps": {"optimizer": {"args": {"lr": 0.02}}, "hyperparameter": {"stay": 0.1}},
}
PARTS = ("base", "configs", "data_loader", "docs", "models", "scripts", "tests", "trainer", "utils")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    for name in PARTS:
        unwanted = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(PROJECT / name, folder / name, ignore=unwanted)
    for path in (*PROJECT.glob("*.py"), *PROJECT.glob("*.md"), PROJECT / "pyproject.toml"):
        shutil.copy(path, folder)
    return folder


def call(project, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_method(project):
    """One file, one line (and its import), one recipe."""
    (project / "trainer/methods/mas.py").write_text(METHOD)
    (project / "configs/recipes/mas_voc.json").write_text(json.dumps(RECIPE))
    registry = project / "trainer/methods/__init__.py"
    text = registry.read_text()
    for after, line in LINES.items():
        assert text.count(after) == 1
        text = text.replace(after, after + line)
    registry.write_text(text)


def results(runs, name, step=1):
    return json.loads((runs / f"log/overlap_15-5_{name}/step_{step}/metrics.json").read_text())


@pytest.mark.slow
def test_a_method_is_a_file_a_line_and_a_recipe(project, toy_root, tmp_path):
    config, runs = write_config(tmp_path / "toy.json", toy_root), tmp_path / "runs"
    short = ["-c", config, "-d", "cpu", "--task_step", "all", "--epochs", 1]
    call(project, "train_voc.py", *short, "--method", "mib", "--name", "mib")
    add_method(project)
    log = call(project, "train_voc.py", *short, "--method", "mas", "--name", "mas")
    assert "recipe: configs/recipes/mas_voc.json: hyperparameter.ce 1" in log
    assert "squared distance of weights" in call(
        project, "train_voc.py", "--method", "mas", "--help"
    )

    # An older run of another method is compared with it, and both by what they have in common.
    before, after = (results(runs, name) for name in ("mib", "mas"))
    assert before["code"] == after["code"]
    assert "trainer/methods/mas.py" in after["own_code"]
    assert "trainer/methods/mib.py" in before["own_code"]
    common = before["own_code"].keys() & after["own_code"].keys()
    assert "trainer/methods/background.py" in common
    call(project, "scripts/report.py", runs, "--out", tmp_path / "report", "--pictures", 0)
    (task,) = json.loads((tmp_path / "report/report.json").read_text())["tasks"]
    assert [method["label"] for method in task["methods"]] == ["MAS", "MiB"]
    assert not [warning for warning in task["warnings"] if "Not the same" in warning]

    out = tmp_path / "comparison"
    flags = ["--out", out, "--data_dir", toy_root, "--config", config, "--base_epochs", 1]
    flags += [
        "--epochs",
        1,
        "--seed",
        1,
        "--task",
        "15-5=" + json.dumps([[*range(1, 16)], [*range(16, 21)]]),
    ]
    call(project, "scripts/compare_methods.py", *flags, "--methods", "mas")
    told = " ".join(call(project, "scripts/compare_methods.py", "--help").split())
    assert " mas " in told.split("joint-NAME (default: ")[1].split(")")[0]

    weights = runs / "models/overlap_15-5_mas/step_1/checkpoint-epoch1.pth"
    image = next((toy_root / "JPEGImages").iterdir())
    call(project, "scripts/predict.py", "-r", weights, "--out", tmp_path / "answer", image)
    assert (tmp_path / f"answer/{image.stem}.png").is_file()


@pytest.mark.slow
def test_the_tests_of_the_project_pass_with_it(project):
    """Of those that go through all methods, recipes, documents or files, the quick ones."""
    add_method(project)
    for name in ("demo.png", "report.png"):
        (project / "scripts" / name).touch()  # which the README names
    files = ("readme", "methods", "method_invariants", "layers", "compare_methods")
    call(project, "-m", "pytest", "-n", 0, *(f"tests/test_{name}.py" for name in files))
