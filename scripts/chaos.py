"""Break training runs on purpose and check that nothing is lost and nothing is different.

    python scripts/chaos.py [--trials 3] [--only KIND …] [--seed 0] [--dir DIR]

A small job (two steps of task 15-5 with replay memory, on synthetic data, on the CPU) is first run
undisturbed, with one process and with two. Then each kind of fault is tried several times at random
moments. After a fault the job is called again with `-r auto`; it must end with the bit-identical
weights and confusion matrices of the undisturbed run. A fault that the run itself can notice must
also end it with the right exit code and one clear sentence. Ends with a table and exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.make_toy_voc import CLASS_NAMES, make_toy_voc
from utils import checkpoint as files
from utils import interrupt
from utils.misc import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PART,
    PROJECT_ROOT,
    UserError,
    one_sentence_errors,
)

TIMEOUT = 300  # seconds that any process of the job may take
EPOCHS = 4
EXPERIMENT = "overlap_15-5_chaos"


class Broken(Exception):
    """A promise that was not kept, in words."""


def require(kept: bool, promise: str) -> None:
    """Raise `Broken` unless the promise was kept."""
    if not kept:
        raise Broken(promise)


@dataclass
class Job:
    """The steps of the job in a folder of their own.

    Attributes:
        folder: holds `data`, `config.json` and `runs`.
        processes: 1 or 2.
        outcome: what the fault led to, for the report.
        steps: which are trained.
    """

    steps: ClassVar[tuple[int, ...]] = (0, 1)

    folder: Path
    processes: int = 1
    outcome: str = ""

    def prepare(self, data: Path) -> Job:
        """Copy the data and write the config."""
        shutil.copytree(data, self.folder / "data")

        def block(crop: int, batch: int) -> dict:
            return {"args": {"transform_args": {"crop_size": crop}}, "batch_size": batch}

        tree = {
            "name": "chaos",
            "n_gpu": self.processes,
            "multiprocessing_distributed": self.processes > 1,
            "arch": {"args": {"backbone": "tiny", "backbone_pretrained": False}},
            "data_loader": {
                "args": {
                    "data_dir": str(self.folder / "data"),
                    "class_names": list(CLASS_NAMES),
                    "task": {"name": "15-5", "idxs_path": str(self.folder / "lists")},
                    "train": block(48, 8 // self.processes),
                    "val": block(48, 8),
                    "test": block(48, 8),
                    "num_workers": 1,
                    "memory": {"mem_size": 10},
                }
            },
            "trainer": {"epochs": EPOCHS, "save_dir": str(self.folder / "runs")},
        }
        (self.folder / "config.json").write_text(json.dumps(tree))
        return self

    def start(self, step: int) -> subprocess.Popen:
        """Call a step with `-r auto`, in a process group of its own."""
        command = [sys.executable, "train_voc.py", "-c", str(self.folder / "config.json")]
        command += ["-d", "cpu", "-r", "auto", "--task_step", str(step)]
        command += ["--freeze_bn"] if step else []
        log = open(self.folder / "output.txt", "a+")  # noqa: SIM115 - closed by `wait`
        process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        process.log, process.log_start = log, log.tell()  # type: ignore[attr-defined]
        return process

    def wait(self, process: subprocess.Popen) -> tuple[int, str]:
        """Exit code and output of a started step, whose group is gone afterwards."""
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Broken(f"a process did not end in {TIMEOUT} s") from None
        finally:
            kill_group(process)
        with process.log as log:  # type: ignore[attr-defined]
            log.seek(process.log_start)  # type: ignore[attr-defined]
            return code, log.read()

    def finish(self) -> None:
        """Call every step until it is done, as the user's script does."""
        for step in self.steps:
            code, output = self.wait(self.start(step))
            require(code == 0, f"step {step} ends with code {code}:\n{output[-3000:]}")

    def step_dir(self, step: int) -> Path:
        """Where the checkpoints of a step lie."""
        return self.folder / "runs/models" / EXPERIMENT / f"step_{step}"

    def metrics(self, step: int) -> Path:
        """The test result of a step."""
        return self.folder / "runs/log" / EXPERIMENT / f"step_{step}" / "metrics.json"

    def result(self) -> list:
        """The final weights and the confusion matrix of each step."""
        found = []
        for step in self.steps:
            weights = files.load(self.step_dir(step) / files.epoch_file(EPOCHS))["state_dict"]
            found.append((weights, json.loads(self.metrics(step).read_text())["confusion"]))
        return found

    def compare(self, expected: list) -> None:
        """Require the bits of the undisturbed run."""
        for step, mine, theirs in zip(self.steps, self.result(), expected, strict=True):
            (a, confusion), (b, other) = mine, theirs
            same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            require(same, f"the weights of step {step} differ from the undisturbed run's")
            require(confusion == other, f"the metrics of step {step} differ")

    def wait_for(self, process: subprocess.Popen, there: Callable[[], object], what: str) -> None:
        """Wait until something is there; the process must not end before."""
        limit = time.monotonic() + TIMEOUT
        while not there():
            require(process.poll() is None, f"the run ended before {what}")
            require(time.monotonic() < limit, f"{what} did not come in {TIMEOUT} s")
            time.sleep(0.0005)


def kill_group(process: subprocess.Popen) -> None:
    """kill -9 a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Moment:
    """When a signal comes: after a line of the log, if any, within some seconds (per process)."""

    words: str
    log: str
    seconds: float


MOMENTS = (
    Moment("while it starts", "", 2.5),
    Moment("in between", "leakage audit", 1.0),
    Moment("at the end", f"epoch {EPOCHS}/{EPOCHS}: ", 0.7),
)


# ------------------------------------------------------------------------------------------ faults
# Each function starts the job, breaks it once at a random moment, and checks how it ended. The
# caller then finishes the job and compares.
def in_an_epoch(job: Job, chance: random.Random) -> None:
    """kill -9 somewhere between the first checkpoint and the end of the step."""
    step = chance.choice((0, 1))
    if step:
        job.wait(job.start(0))
    process = job.start(step)
    job.wait_for(process, (job.step_dir(step) / files.LAST).is_file, "the first checkpoint")
    time.sleep(chance.uniform(0, 0.6))
    kill_group(process)
    job.wait(process)


def at_any_moment(job: Job, chance: random.Random) -> None:
    """kill -9 between the start and a few seconds later, whatever is going on."""
    process = job.start(0)
    time.sleep(chance.uniform(0, 7))
    kill_group(process)
    job.wait(process)


def while_a_checkpoint_is_written(job: Job, chance: random.Random) -> None:
    """kill -9 as soon as a half-written file is seen."""
    folder = job.step_dir(0)
    process = job.start(0)
    epochs = chance.randint(0, EPOCHS - 2)
    if epochs:
        job.wait_for(process, lambda: log_has(job, f"epoch {epochs}/"), f"epoch {epochs}")
    job.wait_for(process, lambda: any(folder.glob(f".{files.LAST}.*{PART}")), "a checkpoint")
    kill_group(process)
    job.wait(process)


def between_steps(job: Job, chance: random.Random) -> None:
    """kill -9 after step 0 is done and before step 1 has a checkpoint."""
    job.wait(job.start(0))
    process = job.start(1)
    time.sleep(chance.uniform(0, 4))
    kill_group(process)
    job.wait(process)


def one_rank_of_two(job: Job, chance: random.Random) -> None:
    """kill -9 one of two processes; the other must not wait for ever."""
    process = job.start(0)
    job.wait_for(process, (job.step_dir(0) / files.LAST).is_file, "the first checkpoint")
    time.sleep(chance.uniform(0, 0.3))
    victims = ranks_of(process)
    if not victims:  # the step was quicker
        job.wait(process)
        return
    os.kill(chance.choice(victims), signal.SIGKILL)
    code, output = job.wait(process)
    require(code not in (0, None), "the launcher did not notice that a rank died")
    require("was killed by SIGKILL" in output, f"the cause was not told:\n{output[-2000:]}")


def asked_to_stop(job: Job, chance: random.Random) -> None:
    """SIGTERM, SIGINT or SIGUSR1 from the script's first lines until its process is gone.

    To the launching process alone, or to the whole group; while it starts, in between, or in the
    last second.
    """
    number = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    moment = chance.choice(MOMENTS)
    process = job.start(0)
    job.wait_for(process, lambda: answers_signals(process.pid), "the script's first lines")
    if moment.log:
        job.wait_for(process, lambda: log_has(job, moment.log), moment.log)
    time.sleep(chance.uniform(0, moment.seconds * job.processes))
    with contextlib.suppress(ProcessLookupError):
        (os.kill if chance.random() < 0.5 else os.killpg)(process.pid, number)
    code, output = job.wait(process)
    job.outcome = f"{signal.Signals(number).name} {moment.words}: code {code}"
    require(code in (EXIT_INTERRUPTED, 0), f"{job.outcome}:\n{output[-2000:]}")
    require("Traceback" not in output, f"{job.outcome}, a traceback:\n{output[-2000:]}")
    if code:
        require(output.count("stopped by") == 1, f"not one sentence:\n{output[-2000:]}")


def full_disk(job: Job, chance: random.Random) -> None:
    """No room for the second or third checkpoint: a small tmpfs, or a limit on file sizes."""
    with small_disk(job) as (fill, how):
        process = job.start(0)
        last = job.step_dir(0) / files.LAST
        job.wait_for(process, last.is_file, "the first checkpoint")
        time.sleep(chance.uniform(0, 0.1))
        fill(process, last.stat().st_size)
        code, output = job.wait(process)
        require(code in (0, EXIT_USER_ERROR), f"exit code {code} on {how}:\n{output[-2000:]}")
        if code:
            sentence = [line for line in output.splitlines() if ": error: " in line]
            require(len(sentence) == 1, f"not one sentence on {how}:\n{output[-2000:]}")
            require("cannot be written" in sentence[0], sentence[0])
            require("Traceback" not in output, f"a traceback on {how}:\n{output[-2000:]}")
        files.load(last)  # what was saved is whole


def damaged_checkpoint(job: Job, chance: random.Random) -> None:
    """kill -9, then last.pth is cut short, or a bit of it flips."""
    process = job.start(0)
    job.wait_for(process, (job.step_dir(0) / files.PREVIOUS).is_file, "two checkpoints")
    time.sleep(chance.uniform(0, 0.3))
    kill_group(process)
    job.wait(process)
    last = job.step_dir(0) / files.LAST
    whole = bytearray(last.read_bytes())
    last.unlink()  # kept checkpoints share its bytes, and only this name is damaged
    if chance.random() < 0.5:
        last.write_bytes(whole[: chance.randrange(len(whole))])
    else:
        whole[chance.randrange(len(whole) // 10, len(whole) * 9 // 10)] ^= 1 << chance.randrange(8)
        last.write_bytes(whole)
    code, output = job.wait(job.start(0))
    require(code == 0, f"exit code {code} after a damaged last.pth:\n{output[-2000:]}")
    told = f"skipped: checkpoint {last}" in output
    require(told or files_equal(job), "the damage was neither told nor harmless")


def corrupted_image(job: Job, chance: random.Random) -> None:
    """A training image becomes unreadable while the step is running, and is repaired later."""
    images = sorted((job.folder / "data/JPEGImages").iterdir())
    listed = (job.folder / "data/ImageSets/Segmentation/train_aug.txt").read_text()
    victim = chance.choice([path for path in images if path.name in listed])
    whole = victim.read_bytes()
    process = job.start(0)
    job.wait_for(process, (job.step_dir(0) / files.LAST).is_file, "the first checkpoint")
    victim.write_bytes(whole[: len(whole) // 3])
    code, output = job.wait(process)
    victim.write_bytes(whole)
    require(code in (0, EXIT_USER_ERROR), f"exit code {code} on a damaged image:\n{output[-2000:]}")
    if code:
        sentence = [line for line in output.splitlines() if ": error: " in line]
        require(len(sentence) == 1 and str(victim) in sentence[0], f"{sentence}")
        require("train_aug.txt, line" in sentence[0], sentence[0])
        require("Traceback" not in output, f"a traceback:\n{output[-2000:]}")


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it is, and in how many processes the job runs."""

    words: str
    strike: Callable[[Job, random.Random], None]
    processes: int = 1


KINDS = {
    "epoch": Kind("kill -9 inside an epoch", in_an_epoch),
    "moment": Kind("kill -9 at any moment of a step", at_any_moment),
    "writing": Kind("kill -9 while a checkpoint is written", while_a_checkpoint_is_written),
    "between": Kind("kill -9 between steps", between_steps),
    "rank": Kind("kill -9 of one rank of two", one_rank_of_two, processes=2),
    "stop": Kind("SIGTERM, SIGINT, SIGUSR1", asked_to_stop),
    "stop2": Kind("the same with two processes", asked_to_stop, processes=2),
    "disk": Kind("full disk while saving", full_disk),
    "damage": Kind("truncated or altered last.pth", damaged_checkpoint),
    "image": Kind("image damaged in the middle of a step", corrupted_image),
}


# ------------------------------------------------------------------------------------------- tools
def log_has(job: Job, text: str) -> bool:
    """Whether the log of step 0 says something."""
    log = job.metrics(0).with_name("info.log")
    return log.is_file() and text in log.read_text()


def answers_signals(pid: int) -> bool:
    """Whether a process has begun to handle the signals: before that no script can."""
    with contextlib.suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return all(caught >> (number - 1) & 1 for number in interrupt.SIGNALS)
    return True  # a system without /proc


def files_equal(job: Job) -> bool:
    """Whether a flipped bit hit nothing that a checkpoint means, such as padding."""
    _, _, skipped = files.newest_good(job.step_dir(0))
    return not skipped


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = status.read_text().rpartition(")")
            command = (status.parent / "cmdline").read_bytes()
            if int(rest.split()[1]) == launcher.pid and b"spawn_main" in command:
                found.append(int(name.split()[0]))
    return sorted(found)


@contextlib.contextmanager
def small_disk(job: Job) -> Iterator[tuple[Callable[[subprocess.Popen, int], None], str]]:
    """A way to let the disk below the runs become full, and words for it.

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
        with open(runs / "ballast", "wb") as ballast:
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


class Chaos:
    """Reference results and a place for the trials."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "toy"
        make_toy_voc(self.data, train=64, val=24, size=(96, 72), seed=3)
        self.expected: dict[int, list] = {}
        self.numbers = itertools.count()

    def job(self, processes: int) -> Job:
        """A fresh job."""
        folder = self.folder / f"job{next(self.numbers)}"
        folder.mkdir()
        return Job(folder, processes).prepare(self.data)

    def undisturbed(self, processes: int) -> list:
        """The result of a run that nothing happens to."""
        if processes not in self.expected:
            job = self.job(processes)
            job.finish()
            self.expected[processes] = job.result()
        return self.expected[processes]

    def trial(self, name: str, chance: random.Random) -> str:
        """One fault, the way on, and the comparison.

        Returns:
            What the fault led to, where its kind says so.

        Raises:
            Broken: what went wrong.
        """
        kind = KINDS[name]
        expected = self.undisturbed(kind.processes)
        job = self.job(kind.processes)
        kind.strike(job, chance)
        job.finish()
        job.compare(expected)
        parts = [path.name for step in job.steps for path in job.step_dir(step).glob(f".*{PART}")]
        require(not parts, f"half-written files were left: {parts}")
        shutil.rmtree(job.folder)
        return job.outcome


def main() -> int:
    """Parse the arguments, run the trials, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3, help="trials of each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    if args.trials < 1:
        raise UserError("--trials must be at least 1.")
    if args.dir is not None and args.dir.exists():
        raise UserError(f"--dir {args.dir} exists already; name a folder that does not.")
    folder = Path(args.dir or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chaos, survived = Chaos(folder), dict.fromkeys(args.only, 0)
    for name in args.only:
        for number in range(args.trials):
            chance, start = random.Random(f"{args.seed} {name} {number}"), time.monotonic()
            try:
                told = chaos.trial(name, chance)
                survived[name] += 1
                outcome = (f"{told}, " if told else "") + "the same bits as undisturbed"
            except Broken as error:
                outcome = f"BROKEN: {error}"
            seconds = time.monotonic() - start
            print(f"{name} {number + 1}/{args.trials}: {outcome} ({seconds:.0f} s)", flush=True)
    print(f"\n{'fault':<42}{'tried':>6}{'survived':>10}")
    for name in args.only:
        print(f"{KINDS[name].words:<42}{args.trials:>6}{survived[name]:>10}")
    total = args.trials * len(args.only)
    good = sum(survived.values()) == total
    if good and args.dir is None:
        shutil.rmtree(folder)
    else:
        print(f"files: {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    with one_sentence_errors():
        sys.exit(main())
