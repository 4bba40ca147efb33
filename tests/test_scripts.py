"""The shell scripts of the published settings, run on the toy data with a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from data_loader.task_tables import ADE_TASKS, VOC_TASKS
from tests.helpers import PROJECT, write_config

SETTINGS = sorted((PROJECT / "scripts").glob("*/*/train_*.sh"))
SCRIPT = PROJECT / "scripts/voc/overlapped/train_voc_15-5.sh"


def run_script(script, config, folder, *args, **variables):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CONFIG": str(config),
        "SAVE_DIR": str(folder / "runs"),
        "EPOCHS": "1",
        "BS": "8",
        **variables,
    }
    return subprocess.run(
        ["bash", str(script), *args], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(toy_root, tmp_path_factory):
    """The script of 15-5 once run through: its folder and its config."""
    folder = tmp_path_factory.mktemp("script")
    config = write_config(folder / "toy.json", toy_root)
    done = run_script(SCRIPT, config, folder, "--seed", "3")
    assert done.returncode == 0, done.stderr
    return folder, config


def test_a_task_from_one_command(finished):
    folder, config = finished
    log = folder / "runs/log/overlap_15-5_DKD"
    for step in (0, 1):
        assert json.loads((log / f"step_{step}/metrics.json").read_text())["step"] == step
    configs = [
        json.loads((folder / f"runs/models/overlap_15-5_DKD/step_{t}/config.json").read_text())
        for t in (0, 1)
    ]
    assert [c["seed"] for c in configs] == [3, 3]
    assert [c["optimizer"]["args"]["lr"] for c in configs] == [0.001, 0.001], "the file's"
    assert [c["arch"]["args"]["freeze_all_bn"] for c in configs] == [False, True]
    assert [c["hyperparameter"]["pos_weight"] for c in configs] == [2, 1]

    again = run_script(SCRIPT, config, folder, "--seed", "3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished, see ") == 2


@pytest.mark.slow
def test_memory_replay_shares_the_base_step(finished):
    """MEMORY_SIZE makes it DKD-M, in folders of its own; BASE takes the other run's step 0."""
    folder, config = finished
    step0 = folder / "runs/models/overlap_15-5_DKD/step_0"
    done = run_script(SCRIPT, config, folder, "--seed", "3", MEMORY_SIZE="6", BASE=str(step0))
    assert done.returncode == 0, done.stderr
    assert "step 0 is taken from" in done.stdout + done.stderr
    models = folder / "runs/models/overlap_15-5_DKD-M"
    assert (models / "step_0/checkpoint-epoch1.pth").samefile(step0 / "checkpoint-epoch1.pth")
    memory = json.loads((models / "step_1/memory.json").read_text())
    assert len(memory["step_1"]["memory_list"]) == 6
    metrics = folder / "runs/log/overlap_15-5_DKD-M/step_0/metrics.json"
    own = json.loads((folder / "runs/log/overlap_15-5_DKD/step_0/metrics.json").read_text())
    assert json.loads(metrics.read_text())["confusion"] == own["confusion"]


@pytest.mark.parametrize("script", SETTINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["--method", "dkd", "--name", "DKD", "--task_step", "all"]),
        (
            {"GPU": "cpu"},
            ["-d", "cpu", "--method", "dkd", "--name", "DKD", "--task_step", "all"],
        ),
        (
            {"GPU": "0,1", "METHOD": "finetune", "MEMORY_SIZE": "100", "STEP": "1-2", "BS": "4"},
            [
                *("-d", "0,1", "--method", "finetune", "--name", "finetune-M"),
                *("--task_step", "1-2", "--multiprocessing_distributed"),
                *("--mem_size", "100", "--batch_size", "4"),
            ],
        ),
    ],
    ids=["plain", "cpu", "chosen"],
)
def test_what_a_script_calls(script, variables, expected, tmp_path):
    """One training call; no hyper-parameter that the user did not set."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
    command = ["bash", str(script), "--seed", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    program, *words = done.stdout.splitlines()
    dataset, task = script.stem.removeprefix("train_").split("_")
    setting = {"overlapped": "overlap"}.get(script.parent.name, "disjoint")
    assert program == f"train_{dataset}.py"
    assert task in {"voc": VOC_TASKS, "ade": ADE_TASKS}[dataset]
    expected = [*expected, "--task_name", task, "--task_setting", setting, "-r", "auto"]
    assert sorted(words) == sorted(
        [*expected, "--save_dir", f"saved_{dataset}", "--seed", "5"],
    )
