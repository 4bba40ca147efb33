"""`scripts/slurm.sh` on a real Slurm cluster of this machine (see `tests/cluster.py`).

Most jobs train nothing: a stand-in saves and stops as a training does. They are submitted from a
copy of the scripts below a folder with a space in its name.
"""

import json
import shutil
import sys

import pytest

from tests.cluster import MISSING, SECONDS, Cluster
from tests.helpers import PROJECT, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs Slurm, which lacks {', '.join(MISSING)} here: "
        "apt-get install --no-install-recommends slurmctld slurmd slurm-client",
    ),
]
TRAINING = f"""\
import os, signal, sys, time
from pathlib import Path

folder, code = Path(sys.argv[1]), int(sys.argv[2])
name = os.environ["SLURM_JOB_ID"] + " " + os.environ["RANK"]
saved = folder / f"saved {{name}}"
assert sys.argv[3:] == ["-r", "auto"]
assert os.environ["LOCAL_WORLD_SIZE"] == "2"
if saved.exists() or code:
    sys.exit(code)

def save(signal, frame):
    time.sleep(0.5)
    saved.touch()
    os._exit(75)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
(folder / f"started {{name}}").touch()
time.sleep({SECONDS})
sys.exit(3)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The scripts, an environment and a stand-in for training."""
    folder = tmp_path_factory.mktemp("jobs") / "my prøject"
    (folder / "scripts").mkdir(parents=True)
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("slurm.sh", "await.sh"):
        shutil.copy(PROJECT / "scripts" / name, folder / "scripts")
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "stand in.py").write_text(TRAINING)
    return folder


@pytest.fixture
def submit(cluster, project, tmp_path):
    """Submit a job of two ranks on a node; `code` is that of a rank that does not train."""

    def submit(*options, ranks="--ntasks-per-node=2", code=0):
        command = ("sbatch", "--parsable", ranks, "--cpus-per-task=2", *options)
        arguments = ("scripts/slurm.sh", "stand in.py", str(tmp_path), str(code))
        return cluster.call(*command, *arguments, cwd=project)

    return submit


@pytest.fixture
def started(cluster, tmp_path):
    """Wait until so many ranks have started."""
    return lambda ranks: cluster.wait(lambda: len(list(tmp_path.glob("started*"))) == ranks)


def outcome(cluster, job, waiting="0"):
    """State, exit code and restarts of a job once it does not run, nor waits to with so many."""

    def ended():
        shown = cluster.job(job)
        state, restarts = shown["JobState"], shown["Restarts"]
        runs = state in ("RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING")
        waits = (state, restarts) == ("PENDING", waiting)
        return None if runs or waits else (state, shown["ExitCode"], restarts)

    return cluster.wait(ended)


def finish(cluster, *jobs):
    """The jobs are queued again, once, and finish, without the two minutes that Slurm lets pass."""
    for job in jobs:
        state, _, restarts = outcome(cluster, job)
        assert (state, restarts) == ("PENDING", "1")
        # In the same second Slurm would not start it: its credential has just been revoked.
        cluster.call("scontrol", "update", f"jobid={job}", "starttime=now+3")
    for job in jobs:
        assert outcome(cluster, job, waiting="1") == ("COMPLETED", "0:0", "1")


def log_of(project, job):
    return (project / f"slurm-{job}.log").read_text()


def test_a_warned_job_on_two_nodes_is_queued_again_and_finished(
    cluster, project, submit, started, tmp_path
):
    job = submit("--nodes=2")
    started(4)
    step = cluster.call("scontrol", "show", "step", f"{job}.0")
    assert "CPUs=8 " in step, "the ranks have the cores that sbatch was asked for"
    cluster.call("scancel", "--signal=USR1", job)  # to the ranks, as before the time is up
    finish(cluster, job)
    assert len(list(tmp_path.glob("saved*"))) == 4
    assert "interrupted and saved: queued again" in log_of(project, job)


def test_a_signal_for_the_batch_script_alone_reaches_the_ranks(cluster, submit, started):
    job = submit("--export=NONE", ranks="--ntasks=2")
    started(2)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    finish(cluster, job)


def test_a_job_is_warned_before_its_time_is_up(cluster, submit, started):
    jobs = [submit("--time=1", f"--signal={script}USR1@60") for script in ("", "B:")]
    started(4)
    finish(cluster, *jobs)


def test_a_cancelled_job_stays_cancelled(cluster, project, submit, started, tmp_path):
    job = submit()
    started(2)
    cluster.call("scancel", job)
    state, _, restarts = outcome(cluster, job)
    assert (state, restarts) == ("CANCELLED", "0")
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert "interrupted and saved: not queued again" in log_of(project, job)


def test_of_an_array_only_the_warned_job_is_queued_again(cluster, submit, started):
    array = submit("--array=0-1")
    started(4)
    ids = {job: cluster.job(job)["JobId"] for job in (f"{array}_0", f"{array}_1")}
    (last,) = (job for job, number in ids.items() if number == array)
    (other,) = ids.keys() - {last}
    cluster.call("scancel", "--signal=USR1", last)
    finish(cluster, last)
    assert cluster.job(other)["JobState"] == "RUNNING"
    cluster.call("scancel", array)
    assert outcome(cluster, other)[0] == "CANCELLED"


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_job_is_not_queued_again(code, cluster, submit):
    assert outcome(cluster, submit(code=code)) == ("FAILED", f"{code}:0", "0")


def test_a_job_that_may_not_be_queued_again_says_so(cluster, project, submit, started):
    job = submit("--no-requeue")
    started(2)
    cluster.call("scancel", "--signal=USR1", job)
    assert outcome(cluster, job) == ("FAILED", "75:0", "0")
    assert "Slurm did not queue it again; submit it once more" in log_of(project, job)


def test_a_preempted_job_is_queued_again_once(cluster, project, submit, started):
    """With time to save while it still runs, and without, where Slurm itself queues it again."""
    jobs = [submit(f"--partition={name}", "--nodes=1") for name in ("graced", "test")]
    started(4)
    urgent = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null")
    cluster.call("sbatch", *urgent, "--wrap=true", cwd=project)
    finish(cluster, *jobs)


def test_training_is_cancelled_submitted_again_warned_and_finished(cluster, toy_root, tmp_path):
    """The real thing, two ranks, one step."""
    config = write_config(tmp_path / "toy.json", toy_root)

    def train():
        return cluster.call(
            *("sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1"),
            *(f"--output={tmp_path}/%j.log", "scripts/slurm.sh", "train_voc.py", "-c", str(config)),
            *("-d", "cpu", "--task_step", "0", "--bs", "4", "--epochs", "5"),
            cwd=PROJECT,
            env={**cluster.environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )

    def log():
        file = tmp_path / "runs/log/overlap_15-5_toy/step_0/info.log"
        return file.read_text() if file.exists() else ""

    job = train()
    cluster.wait((tmp_path / "runs/models/overlap_15-5_toy/step_0/last.pth").exists)
    cluster.call("scancel", job)
    assert outcome(cluster, job)[0] == "CANCELLED"
    assert "continue with -r auto" in (tmp_path / f"{job}.log").read_text()

    job = train()
    cluster.wait(lambda: "resumed from" in log())
    cluster.call("scancel", "--signal=USR1", job)
    finish(cluster, job)
    assert log().count("resumed from") == 2
    metrics = tmp_path / "runs/log/overlap_15-5_toy/step_0/metrics.json"
    assert json.loads(metrics.read_text())["step"] == 0
