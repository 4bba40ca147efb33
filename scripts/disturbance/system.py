"""What the faults ask of the operating system, and of a job's files."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.disturbance.job import Job
from utils import checkpoint as files
from utils.processes import signals


def log_has(job: Job, text: str) -> bool:
    """Whether the log of step 0 says something."""
    log = job.metrics(0).with_name("info.log")
    return log.is_file() and text in log.read_text(encoding="utf-8")


def answers_signals(pid: int) -> bool:
    """Whether a process has begun to handle the signals: before that no script can."""
    with contextlib.suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return all(caught >> (number - 1) & 1 for number in signals.SIGNALS)
    return True  # a system without /proc


def files_equal(job: Job) -> bool:
    """Whether a flipped bit hit nothing that a checkpoint means, such as padding."""
    _, skipped = files.newest_good(job.step_dir(0))
    return not skipped


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = status.read_text(encoding="utf-8").rpartition(")")
            command = (status.parent / "cmdline").read_bytes()
            if int(rest.split()[1]) == launcher.pid and b"spawn_main" in command:
                pids.append(int(name.split()[0]))
    return sorted(pids)


@contextlib.contextmanager
def small_disk(job: Job) -> Iterator[tuple[Callable[[subprocess.Popen, int], None], str]]:
    """A way to let the disk below the runs become full, and what it is.

    Where this user may mount, it is a tmpfs that is filled up; elsewhere the process may no longer
    write files as large as a checkpoint.
    """
    runs = job.folder / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(runs)], capture_output=True
    )
    if mounted.returncode:

        def limit(process: subprocess.Popen, size: int) -> None:
            half = (size // 2, resource.RLIM_INFINITY)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, half)

        yield limit, "a limit on file sizes"
        return

    def fill(process: subprocess.Popen, size: int) -> None:
        room = shutil.disk_usage(runs).free - size // 2
        # The run writes as well, so the disk may be full before the ballast is whole.
        with contextlib.suppress(OSError), open(runs / "ballast", "wb") as ballast:
            for _ in range(max(0, room) // 2**16):
                ballast.write(bytes(2**16))

    kept = job.folder / "kept"
    try:
        yield fill, "a full tmpfs"
        (runs / "ballast").unlink(missing_ok=True)
        shutil.copytree(runs, kept, symlinks=True)
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    runs.rmdir()
    kept.rename(runs)
