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
from utils.misc import UserError


def test_every_method_has_a_row_and_a_base_of_its_family():
    assert {entry.method for entry in compare_methods.ENTRIES.values()} == METHODS.keys()
    for entry in compare_methods.ENTRIES.values():
        base = compare_methods.BASES[entry.base]
        assert METHODS[base.method].family == METHODS[entry.method].family


def test_table():
    def found(seed, old, new):
        metric = {"old": old, "new": new, "harmonic": 50.0, "overall": 60.0}
        return PROJECT / "no such folder", {"metrics": {compare_methods.METRIC: metric}}

    rows = {"mib": [found(1, 80.0, 40.0), found(2, 81.0, 42.0)], "dkd": [found(1, 90.0, 70.0)]}
    lines = compare_methods.table(rows)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["dkd", "mib"], "as listed"
    assert "| dkd | 1 | 90.00 | 70.00 | 50.00 | 60.00 | - | - |" in lines
    assert (
        "| mib | 2 | 80.50 ± 0.71 | 41.00 ± 1.41 | 50.00 ± 0.00 | 60.00 ± 0.00 | - | - |" in lines
    )


def test_nothing_to_tabulate(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished run; train some with --train SEED"):
        compare_methods.report(tmp_path)


@pytest.mark.slow
def test_a_comparison(toy_root, tmp_path):
    """Two families and a joint run, one epoch each, in the command's own process."""
    make_saliency(toy_root, tmp_path / "maps")
    config = write_config(tmp_path / "c.json", toy_root)
    out = tmp_path / "out"
    script = [sys.executable, "scripts/compare_methods.py", "--out", str(out)]
    flags = ["--config", config, "--data_dir", toy_root, "--saliency_dir", tmp_path / "maps"]
    flags += ["--base_epochs", 1, "--epochs", 1, "--memory", 6, "--train", 3]
    flags += ["--methods", "joint-ft", "mib", "ssul-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in ([*script, *map(str, flags)], script):
        done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    table = (out / "table.md").read_text()
    for task in ("15-5", "15-3-2"):
        assert f"after the last step, {task}" in table
    for row in ("mib", "ssul-m", "joint-ft"):
        assert table.count(f"| {row} | 1 |") == 2
    assert (out / "comparison.png").is_file()
    metrics = out / "runs/log/overlap_15-5_joint-ft-s3-joint/step_1/metrics.json"
    assert json.loads(metrics.read_text())["joint"]
