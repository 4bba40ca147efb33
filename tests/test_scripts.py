"""The shell scripts of the published settings, run on the toy data with a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from data_loader.task_tables import ADE_TASKS, VOC_TASKS
from tests.conftest import PROJECT

SETTINGS = sorted((PROJECT / "scripts").glob("*/*/train_*.sh"))


def run_script(script, config, tmp_path, *args, **variables):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CONFIG": str(config),
        "SAVE_DIR": str(tmp_path / "runs"),
        "EPOCHS": "1",
        "BS": "8",
        **variables,
    }
    return subprocess.run(
        ["bash", str(script), *args], env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_task_from_one_command(toy_config, tmp_path):
    script = PROJECT / "scripts/voc/overlapped/train_voc_15-5.sh"
    first = run_script(script, toy_config, tmp_path, "--seed", "3")
    assert first.returncode == 0, first.stderr
    log = tmp_path / "runs/log/overlap_15-5_DKD"
    trained, evaluated = (
        json.loads((log / name).read_text())
        for name in ("step_1/metrics.json", "step_1/eval/metrics.json")
    )
    assert trained["confusion"] == evaluated["confusion"]
    configs = [
        json.loads((tmp_path / f"runs/models/overlap_15-5_DKD/step_{t}/config.json").read_text())
        for t in (0, 1)
    ]
    assert [c["seed"] for c in configs] == [3, 3]
    assert [c["optimizer"]["args"]["lr"] for c in configs] == [0.001, 0.0001]
    assert [c["arch"]["args"]["freeze_all_bn"] for c in configs] == [False, True]
    assert [c["hyperparameter"]["pos_weight"] for c in configs] == [2, 1]

    again = run_script(script, toy_config, tmp_path, "--seed", "3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished, see ") == 2


def test_memory_replay_shares_the_base_step(toy_config, tmp_path):
    """MEMORY_SIZE makes it DKD-M, in folders of its own; BASE takes the other run's step 0."""
    script = PROJECT / "scripts/voc/overlapped/train_voc_15-5.sh"
    step0 = tmp_path / "runs/models/overlap_15-5_DKD/step_0"
    first = run_script(script, toy_config, tmp_path)
    assert first.returncode == 0, first.stderr
    second = run_script(script, toy_config, tmp_path, MEMORY_SIZE="6", BASE=str(step0))
    assert second.returncode == 0, second.stderr
    assert "step 0 is taken from" in second.stdout + second.stderr
    models = tmp_path / "runs/models/overlap_15-5_DKD-M"
    assert (models / "step_0/checkpoint-epoch1.pth").samefile(step0 / "checkpoint-epoch1.pth")
    memory = json.loads((models / "step_1/memory.json").read_text())
    assert len(memory["step_1"]["memory_list"]) == 6
    metrics = tmp_path / "runs/log/overlap_15-5_DKD-M/step_0/metrics.json"
    own = json.loads((tmp_path / "runs/log/overlap_15-5_DKD/step_0/metrics.json").read_text())
    assert json.loads(metrics.read_text())["confusion"] == own["confusion"]


@pytest.mark.parametrize("script", SETTINGS, ids=lambda path: path.stem)
def test_published_values(script):
    """Number of steps and hyper-parameters, as the script hands them to the runner."""
    text = script.read_text().replace('source "$(dirname "$0")/../../run_task.sh"', "set")
    environment = {"PATH": os.environ["PATH"]}
    out = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    values = dict(line.split("=", 1) for line in out.stdout.splitlines() if "=" in line)
    tables, expected = {
        "voc": (VOC_TASKS, ("60", "0.001", "0.0001", "2", "32", "saved_voc")),
        "ade": (ADE_TASKS, ("100", "0.0025", "0.00025", "35", "24", "saved_ade")),
    }[values["DATASET"]]
    assert values["MEMORY_SIZE"] == "0"
    names = ("EPOCHS", "INIT_LR", "LR", "INIT_POS_WEIGHT", "GLOBAL_BATCH", "SAVE_DIR")
    assert tuple(values[name] for name in names) == expected
    assert int(values["STEPS"]) == len(tables[values["TASK"]])
    assert values["SETTING"] == {"overlapped": "overlap"}.get(script.parent.name, "disjoint")
    assert values["TASK"] == script.stem.rsplit("_", 1)[1]
