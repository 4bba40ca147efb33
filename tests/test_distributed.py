"""Several processes on the CPU: the same results as one, errors that end the run, torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import PROJECT, train, write_config
from utils import checkpoint as files
from utils.distributed import launch, plan_launch
from utils.misc import UserError
from utils.parse_config import ConfigParser

TWO = ("--multiprocessing_distributed",)


def metrics(parsed):
    return json.loads((parsed.log_dir() / "metrics.json").read_text())


def with_processes(config, count, batch_size):
    tree = json.loads(config.read_text())
    tree["n_gpu"] = count
    tree["data_loader"]["args"]["train"]["batch_size"] = batch_size
    other = config.with_name(f"processes{count}.json")
    other.write_text(json.dumps(tree))
    return other


@pytest.fixture(scope="module")
def frozen_step(toy_root, tmp_path_factory):
    """Step 1 with frozen BN on one process, and the config for two with the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    config = write_config(folder / "toy.json", toy_root)
    train(config, "--epochs", "1")
    flags = ("--task_step", "1", "--freeze_bn", "--lr", "1e-3", "--epochs", "2")
    one = train(config, *flags)
    return with_processes(config, 2, 4), flags, one, folder


def test_two_processes_train_and_evaluate_as_one(frozen_step):
    config, flags, one, folder = frozen_step
    saved = in_fresh_folder(one, folder / "two")
    two = train(config, *flags, *TWO, "--save_dir", str(saved))
    log = (two.log_dir() / "info.log").read_text()
    assert "2 process(es) on CPU" in log
    assert "global batch: 8" in log
    assert len(assert_as_one(saved, one)["rng"]) == 2
    # The weights agree to rounding, so a pixel on the edge of a decision may fall either way.
    difference = np.abs(np.array(metrics(one)["confusion"]) - metrics(two)["confusion"])
    assert difference.sum() <= 0.001 * np.sum(metrics(one)["confusion"])
    # Evaluation of the same weights is equal to the pixel.
    train(config, *flags, *TWO, "--test", "--save_dir", str(one["trainer"]["save_dir"]))
    before = metrics(one)
    train(with_processes(config, 1, 4), *flags, "--test")
    assert metrics(one)["confusion"] == before["confusion"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_nodes(nodes, processes, *arguments):
    """One torchrun per node, all on loopback; their outputs."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *rendezvous),
                *(f"--nnodes={nodes}", f"--nproc_per_node={processes}"),
                *("train_voc.py", *arguments),
            ],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]
    out = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * nodes, out
    return out


def test_torchrun_evaluates(frozen_step):
    """Rank and world come from the environment."""
    config, flags, one, _ = frozen_step
    expected = metrics(one)
    saved = ("--save_dir", one["trainer"]["save_dir"])
    out = launch_nodes(1, 2, "-c", str(config), *flags, "--test", *saved)
    assert metrics(one)["confusion"] == expected["confusion"]
    assert "2 process(es) on CPU" in out[0]


def in_fresh_folder(one, folder):
    """A folder for runs in which step 0 is done."""
    (folder / "models" / one.experiment).mkdir(parents=True)
    (folder / "models" / one.experiment / "step_0").symlink_to(one.step_dir(0))
    return folder


def assert_as_one(folder, one):
    """The weights of the run in `folder` are those of one process, but for rounding."""
    name = "checkpoint-epoch2.pth"
    run = folder / "models" / one.experiment / "step_1" / name
    a, b = files.load(one.step_dir() / name), files.load(run)
    assert a["record"] == b["record"]
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][key], value, rtol=1e-4, atol=1e-6, msg=key)
    return b


def test_two_nodes_of_two_processes_train_as_one(frozen_step, tmp_path):
    """Two rendezvoused launchers, the README's torchrun line."""
    config, flags, one, _ = frozen_step
    saved = in_fresh_folder(one, tmp_path / "nodes")
    arguments = ("-c", str(config), *flags, "--bs", "2", "-d", "cpu", "--save_dir", str(saved))
    launch_nodes(2, 2, *arguments)
    assert len(assert_as_one(saved, one)["rng"]) == 4


SRUN = """#!/usr/bin/env python
# Starts the tasks as Slurm does: signals are passed on, the highest exit code is returned.
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$SCONTROL_CALLS"; fi
"""


def test_slurm_job_is_interrupted_queued_again_and_finished(frozen_step, tmp_path):
    """With stand-ins for srun and scontrol: SIGUSR1, code 75, requeue, -r auto, the same result."""
    config, flags, one, _ = frozen_step
    saved = in_fresh_folder(one, tmp_path / "slurm")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN.replace("/usr/bin/env python", sys.executable)),
        ("scontrol", SCONTROL),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SCONTROL_CALLS": str(tmp_path / "calls"),
    }
    arguments = ("-c", str(config), *flags, "-d", "cpu", "--save_dir", str(saved))
    command = ["bash", "scripts/slurm.sh", "train_voc.py", *arguments]

    def job():
        return subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    first = job()
    log = saved / "log" / one.experiment / "step_1" / "info.log"
    limit = time.monotonic() + 120
    while not (log.is_file() and "leakage audit" in log.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR1)  # srun's, as Slurm does before the time is up
    out = first.communicate(timeout=120)[0]
    assert first.returncode == 75, out
    assert "interrupted and saved: queued again" in out
    assert (tmp_path / "calls").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    second = job()
    out = second.communicate(timeout=120)[0]
    assert second.returncode == 0, out
    assert_as_one(saved, one)


def fail_on_rank_1(config, ranks):
    if ranks.rank == 1:
        time.sleep(0.2)
        raise ValueError("the fault of rank 1")
    ranks.sum(torch.ones(1))


def user_error_on_rank_1(config, ranks):
    if ranks.rank == 1:
        raise UserError("a sentence for the user.")
    ranks.sum(torch.ones(1))


def killed_on_rank_1(config, ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), 9)
    ranks.sum(torch.ones(1))


def test_a_failure_before_the_work_is_told(toy_config, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    with pytest.raises(RuntimeError, match=r"rank [01] failed(?s:.)*nope0"):
        launch(fail_on_rank_1, two_process_config(toy_config))


def two_process_config(toy_config):
    config = with_processes(toy_config, 2, 4)
    return ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(config), *TWO]
    )


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (fail_on_rank_1, RuntimeError, "rank 1 failed.*the fault of rank 1"),
        (user_error_on_rank_1, UserError, "^a sentence for the user.$"),
        (killed_on_rank_1, RuntimeError, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_dying_rank_stops_all(toy_config, worker, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        launch(worker, two_process_config(toy_config))


def test_busy_port_is_replaced(toy_config):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        url = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        config = with_processes(toy_config, 2, 4)
        argv = ["-c", str(config), *TWO, "--dist_url", url]
        parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
        plan = plan_launch(parsed, {})
    assert plan.url != url
    assert plan.url.startswith("tcp://127.0.0.1:")
    assert len(plan.devices) == 2
    assert plan.backend == "gloo"


def test_single_device_by_default(toy_config):
    parsed = ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(toy_config)]
    )
    plan = plan_launch(parsed, {})
    assert len(plan.devices) == 1
    assert not plan.distributed


def test_environment_of_torchrun(toy_config):
    parsed = ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(toy_config)]
    )
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    plan = plan_launch(parsed, environment)
    assert plan.by_torchrun
    assert plan.url == "env://"
