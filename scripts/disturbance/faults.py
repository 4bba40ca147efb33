"""The faults that are injected into a job.

Each function starts the job, breaks it once at a random moment, and checks how it ended.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.disturbance.job import EPOCHS, Job, require
from scripts.disturbance.system import answers_signals, files_equal, log_has, ranks_of, small_disk
from utils import checkpoint as files
from utils.errors import EXIT_USER_ERROR
from utils.files import PART
from utils.processes.signals import EXIT_INTERRUPTED


@dataclass(frozen=True)
class Moment:
    """When a signal comes: after a line of the log, if any, within some seconds (per process)."""

    name: str
    log: str
    seconds: float


MOMENTS = (
    Moment("while it starts", "", 2.5),
    Moment("in between", "leakage audit", 1.0),
    Moment("at the end", f"epoch {EPOCHS}/{EPOCHS}: ", 0.7),
)


def in_an_epoch(job: Job, chance: random.Random) -> None:
    """kill -9 somewhere between the first checkpoint and the end of the step."""
    step = chance.choice((0, 1))
    if step:
        job.wait(job.start(0))
    process = job.start(step)
    job.wait_for(process, (job.step_dir(step) / files.LAST).is_file, "the first checkpoint")
    time.sleep(chance.uniform(0, 0.6))
    job.kill(process)


def at_any_moment(job: Job, chance: random.Random) -> None:
    """kill -9 between the start and a few seconds later, whatever is going on."""
    process = job.start(0)
    time.sleep(chance.uniform(0, 7))
    job.kill(process)


def while_a_checkpoint_is_written(job: Job, chance: random.Random) -> None:
    """kill -9 as soon as a half-written file is seen."""
    folder = job.step_dir(0)
    process = job.start(0)
    epochs = chance.randint(0, EPOCHS - 2)
    if epochs:
        job.wait_for(process, lambda: log_has(job, f"epoch {epochs}/"), f"epoch {epochs}")
    job.wait_for(process, lambda: any(folder.glob(f".{files.LAST}.*{PART}")), "a checkpoint")
    job.kill(process)


def between_steps(job: Job, chance: random.Random) -> None:
    """kill -9 after step 0 is done and before step 1 has a checkpoint."""
    job.wait(job.start(0))
    process = job.start(1)
    time.sleep(chance.uniform(0, 4))
    job.kill(process)


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
    require("was killed by SIGKILL" in output, f"the cause was not told:\n{end(output)}")


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
    job.outcome = f"{signal.Signals(number).name} {moment.name}: code {code}"
    require(code in (EXIT_INTERRUPTED, 0), f"{job.outcome}:\n{end(output)}")
    require("Traceback" not in output, f"{job.outcome}, a traceback:\n{end(output)}")
    if code:
        require(output.count("stopped by") == 1, f"not one sentence:\n{end(output)}")


def full_disk(job: Job, chance: random.Random) -> None:
    """No room for the second or third checkpoint: a small tmpfs, or a limit on file sizes."""
    with small_disk(job) as (fill, how):
        process = job.start(0)
        last = job.step_dir(0) / files.LAST
        job.wait_for(process, last.is_file, "the first checkpoint")
        time.sleep(chance.uniform(0, 0.1))
        fill(process, last.stat().st_size)
        done_or_one_sentence(*job.wait(process), how, "cannot be written")
        files.load(last)  # what was saved is whole


def damaged_checkpoint(job: Job, chance: random.Random) -> None:
    """kill -9, then last.pth is cut short, or a bit of it flips."""
    process = job.start(0)
    job.wait_for(process, (job.step_dir(0) / files.PREVIOUS).is_file, "two checkpoints")
    time.sleep(chance.uniform(0, 0.3))
    job.kill(process)
    last = job.step_dir(0) / files.LAST
    whole = bytearray(last.read_bytes())
    last.unlink()  # kept checkpoints share its bytes, and only this name is damaged
    if chance.random() < 0.5:
        last.write_bytes(whole[: chance.randrange(len(whole))])
    else:
        whole[chance.randrange(len(whole) // 10, len(whole) * 9 // 10)] ^= 1 << chance.randrange(8)
        last.write_bytes(whole)
    code, output = job.wait(job.start(0))
    require(code == 0, f"exit code {code} after a damaged last.pth:\n{end(output)}")
    warned = f"skipped: checkpoint {last}" in output
    require(warned or files_equal(job), "the damage was neither told nor harmless")


def corrupted_image(job: Job, chance: random.Random) -> None:
    """A training image becomes unreadable while the step is running, and is repaired later."""
    images = sorted((job.folder / "data/JPEGImages").iterdir())
    listed = (job.folder / "data/ImageSets/Segmentation/train_aug.txt").read_text(encoding="utf-8")
    victim = chance.choice([path for path in images if path.name in listed])
    whole = victim.read_bytes()
    process = job.start(0)
    job.wait_for(process, (job.step_dir(0) / files.LAST).is_file, "the first checkpoint")
    victim.write_bytes(whole[: len(whole) // 3])
    code, output = job.wait(process)
    victim.write_bytes(whole)
    done_or_one_sentence(code, output, "a damaged image", str(victim), "train_aug.txt, line")


def done_or_one_sentence(code: int, output: str, fault: str, *parts: str) -> None:
    """Require that a run came to its end, or that it told a fault in one sentence."""
    require(code in (0, EXIT_USER_ERROR), f"exit code {code} on {fault}:\n{end(output)}")
    if code:
        sentences = [line for line in output.splitlines() if ": error: " in line]
        require(len(sentences) == 1, f"not one sentence on {fault}:\n{end(output)}")
        require(all(part in sentences[0] for part in parts), sentences[0])
        require("Traceback" not in output, f"a traceback on {fault}:\n{end(output)}")


def end(output: str) -> str:
    """The last lines of an output."""
    return output[-2000:]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it is, and in how many processes the job runs."""

    title: str
    inject: Callable[[Job, random.Random], None]
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
