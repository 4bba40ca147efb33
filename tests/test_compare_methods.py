"""`scripts/compare_methods.py`: a row per method, each from its own family's base step."""

import json
import os
import subprocess
import sys

import pytest

from scripts import compare_methods
from scripts.toy_data.tree import make_saliency
from tests.helpers import PROJECT, write_config
from trainer.methods import METHODS


def test_every_method_has_a_row_and_a_base_of_its_family():
    assert METHODS.keys() <= {*compare_methods.SHOWN}
    for name in METHODS:
        base = compare_methods.tuned(name).base
        assert METHODS[base].family == METHODS[name].family
        assert compare_methods.tuned(base).base == base


@pytest.mark.slow
def test_a_comparison(toy_root, tmp_path):
    """Two families and a joint run, one epoch each, in the command's own process."""
    make_saliency(toy_root, tmp_path / "maps")
    config = write_config(tmp_path / "c.json", toy_root)
    out = tmp_path / "out"
    script = [sys.executable, "scripts/compare_methods.py", "--out", str(out)]
    flags = ["--config", config, "--data_dir", toy_root, "--saliency_dir", tmp_path / "maps"]
    flags += ["--base_epochs", 1, "--epochs", 1, "--memory", 6, "--seed", 3]
    flags += ["--methods", "joint-ft", "mib", "ssul-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    report = [sys.executable, "scripts/report.py", str(out / "runs"), "--out", str(out)]
    for words in ([*script, *map(str, flags)], [*report, "--pictures", "0"]):
        done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    tasks = {task["task"]: task for task in json.loads((out / "report.json").read_text())["tasks"]}
    assert tasks.keys() == {"15-5", "15-3-2"}
    for task in tasks.values():
        assert [method["label"] for method in task["methods"]] == ["MiB", "SSUL-M", "joint (FT)"]
