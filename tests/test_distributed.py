"""Several processes on the CPU: the same results as one, errors that end the run, torchrun."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.helpers import PROJECT, train, write_config
from utils import checkpoint as files
from utils.errors import UserError
from utils.parse_config import ConfigParser
from utils.processes import devices, meet
from utils.processes import launch as launching
from utils.processes.launch import Launch, launch, plan_launch
from utils.processes.signals import Interrupted
from utils.ranks import Ranks

TWO = ("--multiprocessing_distributed",)


def launch_as_planned(worker, config):
    """As a run does, without what precedes it."""
    launch(worker, config, plan_launch(config))


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
    train(config, "--epochs", "1", "--pos_weight", "1")
    flags = ("--task_step", "1", "--freeze_bn", "--lr", "1e-3", "--epochs", "2")
    one = train(config, *flags)
    return with_processes(config, 2, 4), flags, one, folder


def test_two_processes_train_as_one(frozen_step):
    config, flags, one, folder = frozen_step
    saved = in_fresh_folder(one, folder / "two")
    two = train(config, *flags, *TWO, "--save_dir", str(saved))
    log = (two.log_dir() / "info.log").read_text()
    assert "2 process(es) on CPU" in log
    assert "global batch: 8" in log
    assert len(assert_as_one(saved, one)["rng"]) == 2
    expected, found = (
        json.loads((run.log_dir() / "history.json").read_text())["epochs"] for run in (one, two)
    )
    for ours, theirs in zip(found, expected, strict=True):
        # Of the images of both, whose losses differ.
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        images = [epoch["images_per_s"] * epoch["seconds"] for epoch in (ours, theirs)]
        assert images[0] == pytest.approx(images[1])
    # The weights agree to rounding, so a pixel on the edge of a decision may fall either way.
    difference = np.abs(np.array(metrics(one)["confusion"]) - metrics(two)["confusion"])
    assert difference.sum() <= 0.001 * np.sum(metrics(one)["confusion"])


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


@pytest.mark.slow
def test_two_processes_of_torchrun_evaluate_as_one(frozen_step):
    """Equal to the pixel for the same weights; rank and world come from the environment."""
    config, flags, one, _ = frozen_step
    expected = metrics(one)
    saved = ("--save_dir", one["trainer"]["save_dir"])
    out = launch_nodes(1, 2, "-c", str(config), *flags, "--test", *saved)
    assert metrics(one)["confusion"] == expected["confusion"]
    assert "2 process(es) on CPU" in out[0]


def in_fresh_folder(one, folder):
    """A folder for runs in which step 0 is done."""
    (folder / "models" / one.run_folder.name).mkdir(parents=True)
    (folder / "models" / one.run_folder.name / "step_0").symlink_to(one.step_dir(0))
    return folder


def assert_as_one(folder, one):
    """The weights of the run in `folder` are those of one process, but for rounding."""
    name = "checkpoint-epoch2.pth"
    run = folder / "models" / one.run_folder.name / "step_1" / name
    a, b = files.load(one.step_dir() / name), files.load(run)
    assert a["record"] == b["record"]
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][key], value, rtol=1e-4, atol=1e-6, msg=key)
    return b


@pytest.mark.slow
def test_two_nodes_of_two_processes_train_as_one(frozen_step, tmp_path):
    """Two rendezvoused launchers, the README's torchrun line."""
    config, flags, one, _ = frozen_step
    saved = in_fresh_folder(one, tmp_path / "nodes")
    arguments = ("-c", str(config), *flags, "--bs", "2", "-d", "cpu", "--save_dir", str(saved))
    launch_nodes(2, 2, *arguments)
    assert len(assert_as_one(saved, one)["rng"]) == 4


SRUN = """#!/usr/bin/env python
# Starts the tasks as Slurm does: signals are passed on, the highest exit code is returned; when a
# task has ended, the others are killed after --wait (here thirty times as soon).
import itertools, os, signal, subprocess, sys, time
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options):]
waits = [int(word.partition("=")[2]) for word in options if word.startswith("--wait=")] or [9999]
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
while all(task.poll() is None for task in tasks):
    time.sleep(0.05)
limit = time.monotonic() + waits[0] / 30
while any(task.poll() is None for task in tasks) and time.monotonic() < limit:
    time.sleep(0.05)
codes = [task.poll() for task in tasks]
[task.kill() for task in tasks]
sys.exit(max(137 if code is None else code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && { echo 127.0.0.1; exit; }
echo "$@" >>"$SCONTROL_CALLS"
exit "$SCONTROL_CODE"
"""
SQUEUE = """#!/usr/bin/env bash
[[ " $* " == *" -j $JOB "* && -z "${SQUEUE_STATES:-}" && "$STATES" ]] || exit 1
echo >>"$0.calls"
states=($STATES)
echo "${states[$(wc -l <"$0.calls") - 1]}"
"""


def slurm(tmp_path, python=sys.executable):
    """An environment with stand-ins for srun, scontrol and squeue; the job is running."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN.replace("/usr/bin/env python", sys.executable)),
        ("scontrol", SCONTROL),
        ("squeue", SQUEUE),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = str(free_port())
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "STATES": "RUNNING",
        "JOB": job,
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SCONTROL_CALLS": str(tmp_path / "calls"),
        "SCONTROL_CODE": "0",
    }


@pytest.mark.slow
def test_slurm_job_is_interrupted_queued_again_and_finished(frozen_step, tmp_path):
    """SIGUSR1, code 75, requeue, -r auto, the same result."""
    config, flags, one, _ = frozen_step
    saved = in_fresh_folder(one, tmp_path / "slurm")
    environment = slurm(tmp_path)
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
    log = saved / "log" / one.run_folder.name / "step_1" / "info.log"
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


def test_slurm_ends_ranks_that_wait_for_a_failed_one(tmp_path):
    """As with NCCL: rank 1 fails, and rank 0 neither notices nor handles a signal."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n[ $RANK = 1 ] && exit 2\ntrap '' TERM; exec sleep 200\n")
    program.chmod(0o755)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "scripts/slurm.sh", "train_voc.py"],
        cwd=PROJECT,
        env=slurm(tmp_path, program),
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    assert time.monotonic() - start < 30
    assert done.returncode == 137
    assert not (tmp_path / "calls").exists(), "a failed job is not queued again"


@pytest.mark.parametrize(
    ("variables", "requeued", "words"),
    [
        ({}, "7", "queued again"),
        ({"STATES": "SIGNALING SIGNALING RUNNING"}, "7", "queued again"),
        ({"STATES": "COMPLETING"}, "", "not queued again, because the job's state is COMPLETING"),
        ({"STATES": ""}, "", "not queued again, because the job's state is unknown"),
        ({"SCONTROL_CODE": "1"}, "7", "Slurm did not queue it again; submit it once more"),
        ({"SQUEUE_STATES": "PENDING"}, "7", "queued again"),
        # The last job of an array has the array's id, with which Slurm means all of them.
        ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "JOB": "7_3"}, "7_3", "queued"),
        ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "7", "queued again"),
        ({"CODE": "1"}, "", ""),
        ({"CODE": "2"}, "", ""),
        ({"CODE": "0"}, "", ""),
    ],
    ids=[
        *("running", "signal on its way", "cancelled", "no answer", "refused", "own filters"),
        *("array", "array of the parent", "failed", "wrong input", "done"),
    ],
)
def test_slurm_job_is_queued_again_only_while_it_runs(variables, requeued, words, tmp_path):
    program = tmp_path / "my python"
    program.write_text('#!/bin/sh\nexit "${CODE:-75}"\n')
    program.chmod(0o755)
    environment = {**slurm(tmp_path, program), "SLURM_JOB_ID": "7", "JOB": "7", **variables}
    done = subprocess.run(
        ["bash", "scripts/slurm.sh", "train_voc.py"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == int(variables.get("CODE", 75)), done.stderr
    assert words in done.stdout
    assert ("interrupted and saved" in done.stdout) == bool(words)
    calls = tmp_path / "calls"
    assert (calls.read_text() if calls.exists() else "") == (requeued and f"requeue {requeued}\n")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("SLURM_JOB_ID", "no job of Slurm"),
        ("SLURM_SUBMIT_DIR", "not the project's folder"),
    ],
)
def test_slurm_script_started_wrongly_is_told(missing, words, tmp_path):
    environment = slurm(tmp_path)
    del environment[missing]
    done = subprocess.run(
        ["bash", str(PROJECT / "scripts/slurm.sh"), "train_voc.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, "one sentence"


FAILING = """
import atexit, sys, time
import torch, torch.distributed as dist
from utils.processes.launch import launch, plan_launch
from utils.errors import UserError, one_sentence_errors
from utils.parse_config import ConfigParser

def worker(config, ranks):
    if ranks.rank == {rank}:
        # As NCCL does: leaving the group, and the end of the interpreter, wait for the other ranks.
        dist.destroy_process_group = lambda: time.sleep(3600)
        atexit.register(time.sleep, 3600)
    with {before}:
        if ranks.rank == {rank}:
            time.sleep(0.5)
            raise {error}("the fault of rank {rank}.")
    ranks.sum(torch.ones(1))

with one_sentence_errors():
    config = ConfigParser.from_args("train", "configs/config_voc.json", argv=["-d", "cpu"])
    launch(worker, config, plan_launch(config))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "before", "error", "words"),
    [
        (1, "torch.no_grad()", "ValueError", "ValueError: the fault of rank 1."),
        (0, "ranks.main_first()", "UserError", "fail.py: error: the fault of rank 0."),
    ],
)
def test_a_failing_rank_under_torchrun_ends_all(tmp_path, rank, before, error, words):
    script = tmp_path / "fail.py"
    script.write_text(FAILING.format(rank=rank, before=before, error=error))
    start = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", str(script)),
        ],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert time.monotonic() - start < 45
    assert done.returncode == 1
    assert done.stdout.splitlines().count(words) == 1, done.stdout


def one_rank(**changes):
    """The plan of one process that torchrun has started."""
    values = {
        **{"devices": (torch.device("cpu"),), "nodes": 1, "node": 0, "backend": "gloo"},
        **{"url": "env://", "by_torchrun": True, "distributed": True},
    }
    return Launch(**{**values, **changes})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, None),
        (UserError("a sentence."), 2),
        (ValueError("a bug"), 1),
        (Interrupted("stopped by SIGTERM."), 75),
        (KeyboardInterrupt(), 1),
    ],
    ids=repr,
)
def test_no_collective_call_on_the_way_out_of_an_exception(monkeypatch, capsys, error, code):
    """And every group has a timeout."""
    calls = {}

    def worker(config, ranks):
        if error is not None:
            raise error

    def leave(code):
        raise SystemExit(code)

    for name in ("init_process_group", "new_group", "destroy_process_group", "barrier"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **kw: calls.setdefault(name, kw))
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("RANK", "0")
    try:
        launch(worker, None, one_rank(backend="nccl"))
        ended = None
    except SystemExit as left:
        ended = left.code
    assert ended == code
    groups = ["init_process_group", "new_group"]
    assert list(calls) == groups + (["destroy_process_group"] if error is None else [])
    assert all(calls[name]["timeout"] == launching.TIMEOUT for name in groups)
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)


def test_hosts_wait_for_each_other_without_their_gpus(monkeypatch):
    """NCCL would not notice that a rank has died; gloo does."""
    groups = []
    monkeypatch.setattr(dist, "barrier", lambda group=None: groups.append(group))
    monkeypatch.setattr(dist, "all_gather_object", lambda *_, group=None: groups.append(group))
    ranks = Ranks(1, 2, torch.device("cpu"), cpu_group="gloo")
    ranks.barrier()
    ranks.gather(1)
    with ranks.main_first():
        pass
    assert groups == ["gloo"] * 3


@pytest.mark.slow
def test_a_rank_that_hears_no_signal_is_killed(toy_config, monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^a sentence for the user\.$"):
        launch_as_planned(ranks.deaf_on_rank_0, two_process_config(toy_config))
    assert time.monotonic() - start < 25


@pytest.mark.slow
def test_a_signal_while_ranks_start_and_exit():
    plan = one_rank(by_torchrun=False, url=f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(Interrupted, match=r"^stopped by SIGUSR1\.$"):
        launch(ranks.no_work, ranks.StruckAtBirth(), plan)
    with pytest.raises(Interrupted, match=r"^stopped by SIGUSR1\.$"):
        launch(ranks.library_that_swallows, None, plan)
    launch(ranks.strike_at_exit, None, plan)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_failure_before_the_work_is_told(toy_config, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    with pytest.raises(RuntimeError, match=r"rank [01] failed(?s:.)*nope0"):
        launch_as_planned(ranks.fail_on_rank_1, two_process_config(toy_config))


def two_process_config(toy_config):
    config = with_processes(toy_config, 2, 4)
    return ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(config), *TWO]
    )


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (ranks.fail_on_rank_1, "rank 1 failed.*the fault of rank 1"),
        pytest.param(
            ranks.killed_on_rank_1, "rank 1 was killed by SIGKILL", marks=pytest.mark.slow
        ),
    ],
)
def test_a_dying_rank_stops_all(toy_config, worker, message):
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        launch_as_planned(worker, two_process_config(toy_config))


def test_two_runs_with_the_same_port(toy_config, caplog):
    """Nobody takes a port between choice and use: a run listens before its ranks are started."""
    url = f"tcp://127.0.0.1:{free_port()}"
    parsed = parsed_with(with_processes(toy_config, 2, 4), *TWO, "--dist_url", url)
    plan = plan_launch(parsed, {})
    assert (len(plan.devices), plan.backend, plan.url) == (2, "gloo", url)
    with meet.hold(url) as first:
        assert first == url
        with pytest.raises(OSError, match="in use"):
            socket.create_server(meet.address(url))
        launch(ranks.sum_of_ranks, parsed, plan)
    assert f"dist_url: port {meet.address(url)[1]} is busy, port" in caplog.text


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


def parsed_with(toy_config, *argv):
    return ConfigParser.from_args(
        "train", "configs/config_voc.json", argv=["-c", str(toy_config), *argv]
    )


def test_the_environment_says_where_to_meet(toy_config):
    config = parsed_with(with_processes(toy_config, 2, 4), *TWO, "--dist_url", "env://")
    plan = plan_launch(config, {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"})
    assert plan.url == "tcp://node7:1234"


# ----------------------------------------------------------------------------------- several nodes
@pytest.mark.parametrize(
    ("own", "gloo", "nodes", "warns"),
    [
        ("127.0.1.1", "", 2, True),
        ("127.0.1.1", "eth0", 2, False),
        ("10.0.0.5", "", 2, False),
        ("127.0.1.1", "", 1, False),
    ],
)
def test_a_name_that_leads_no_other_node_here_is_told(monkeypatch, caplog, own, gloo, nodes, warns):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: own)
    monkeypatch.setattr(launching, "_as_rank", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    launch(ranks.no_work, None, one_rank(nodes=nodes))
    assert ("set GLOO_SOCKET_IFNAME" in caplog.text) == warns


@pytest.mark.parametrize(
    ("flags", "environment", "warns"),
    [
        (["-d", "0,1"], {}, True),
        (["-d", "0"], {}, False),
        ([], {}, False),
        (["-d", "0,1", "--multiprocessing_distributed"], {}, False),
        (["-d", "0,1"], {"RANK": "0", "WORLD_SIZE": "1"}, False),
    ],
)
def test_several_gpus_for_one_process(toy_config, monkeypatch, caplog, flags, environment, warns):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("_as_rank", "_join"):  # what starts processes
        monkeypatch.setattr(launching, name, lambda *_: [])
    started = SimpleNamespace(processes=[])
    monkeypatch.setattr(launching.mp, "start_processes", lambda *_, **__: started)
    with caplog.at_level(logging.WARNING, logger="dkd"):
        launch_as_planned(lambda config, ranks: None, parsed_with(toy_config, *flags))
    sentence = "-d 0,1: only cuda:0 is used; all of them need --multiprocessing_distributed"
    told = [message for message in caplog.messages if message.startswith("-d")]
    assert told == [sentence] * warns


def test_a_gpu_that_is_asked_for_must_be_there_to_train(monkeypatch, toy_config, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = (
        r"-d/--device is '0', but GPU 0 does not exist; visible: none \(torch .*\), so use -d cpu"
    )
    with pytest.raises(UserError, match=says):
        train(toy_config, "-d", "0")
    assert not (toy_config.parent / "runs").exists()
    assert devices.find_devices("0") == [torch.device("cpu")], "published evaluations end so"


@pytest.mark.parametrize("flags", [(), ("-d", "cpu")])
def test_training_without_a_gpu_is_told_loudly_unless_it_is_meant(toy_config, flags):
    parsed = train(toy_config, "--epochs", "1", *flags)
    lines = (parsed.log_dir() / "info.log").read_text().splitlines()
    loud = [number for number, line in enumerate(lines) if "WARNING NO GPU IS USED: torch" in line]
    assert len(loud) == (not flags)
    assert not flags or not loud
    assert all(number < 6 for number in loud), "among the first lines"
