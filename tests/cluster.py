"""A Slurm cluster for tests on this machine alone: without root and munge, own ports and files."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
MISSING = [
    tool
    for tool in ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
    if shutil.which(tool, path=PATH) is None
]
SECONDS = 300  # at most, for anything that a test waits for
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=32
PartitionName=test Nodes=ALL Default=YES PriorityTier=1
PartitionName=graced Nodes=ALL PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


class Cluster:
    """Two nodes on this machine, with three partitions: `urgent` preempts the other two.

    It runs in a `with` block, at whose end nothing of it or of its jobs is left.

    Args:
        folder: an empty one; all its files are there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        own = ("SLURM", "SBATCH", "SRUN", "SQUEUE", "SCANCEL", "SINFO", "SCONTROL")
        clean = {key: text for key, text in os.environ.items() if not key.startswith(own)}
        self.environment = {**clean, "PATH": PATH, "SLURM_CONF": str(self.config)}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir()
        values = {"host": HOST, "nodes": ",".join(NODES), "user": self.user}
        self.config.write_text(CONFIG.format(folder=self.folder, ports=free_ports(3), **values))
        try:
            self._start("slurmctld")
            for node in NODES:
                (self.folder / node).mkdir()
                self._start("slurmd", "-N", node)
            self.wait(self._is_idle)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(AssertionError, subprocess.SubprocessError):  # the rest is killed below
            self.call("scancel", "--user", self.user)
            self.wait(lambda: not self.call("squeue", "-h"), 30)
        self._stop()

    def _is_idle(self) -> bool:
        assert all(daemon.poll() is None for daemon in self._daemons), self._report()
        command = ("sinfo", "-h", "-p", "test", "-t", "idle", "-o", "%D")
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() == str(len(NODES))

    def _start(self, *command: str) -> None:
        """Start a daemon as a child of this process."""
        daemon = subprocess.Popen(
            [*command, "-D", "-f", self.config],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tests, which end the daemons in order
        )
        self._daemons.append(daemon)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            end(daemon)
        mark = f"SLURM_CONF={self.config}".encode()
        for process in Path("/proc").glob("[0-9]*"):  # jobs outlive a killed slurmd
            with suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def call(self, *command: str, **options) -> str:
        """What a client of Slurm prints."""
        done = subprocess.run(
            command,
            **{"env": self.environment, **options},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, job: str) -> Mapping[str, str]:
        """What Slurm knows of a job."""
        text = self.call("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Wait until `condition` returns something true, and return that."""
        limit = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < limit, self._report()
            time.sleep(0.2)
        return value

    def _report(self) -> str:
        logs = (path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
        queue = subprocess.run(
            ["scontrol", "show", "job"], env=self.environment, capture_output=True, text=True
        )
        return "\n".join(("waited in vain", queue.stdout, queue.stderr, *logs))


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def end(process: subprocess.Popen) -> None:
    """End a child: in good order, or after some seconds by force."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
