"""The small job that is disturbed: its steps, its results, and what is promised."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from scripts.toy_data.shapes import CLASS_NAMES
from utils import checkpoint as files
from utils.files import PROJECT_ROOT

TIMEOUT = 300  # seconds that any process of the job may take
EPOCHS = 4
EXPERIMENT = "overlap_15-5_chaos"


class Broken(Exception):
    """A promise that was not kept."""


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
        (self.folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
        return self

    def start(self, step: int) -> subprocess.Popen:
        """Call a step with `-r auto`, in a process group of its own."""
        command = [sys.executable, "train_voc.py", "-c", str(self.folder / "config.json")]
        command += ["-d", "cpu", "-r", "auto", "--task_step", str(step)]
        command += ["--freeze_bn"] if step else []
        log = open(self.folder / "output.txt", "a+", encoding="utf-8")  # noqa: SIM115 - closed by `wait`
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

    def kill(self, process: subprocess.Popen) -> None:
        """kill -9 a started step and all that it started."""
        kill_group(process)
        self.wait(process)

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
        result = []
        for step in self.steps:
            weights = files.load(self.step_dir(step) / files.epoch_file(EPOCHS))["state_dict"]
            metrics = json.loads(self.metrics(step).read_text(encoding="utf-8"))
            result.append((weights, metrics["confusion"]))
        return result

    def compare(self, expected: list) -> None:
        """Require the bits of the undisturbed run."""
        for step, ours, undisturbed in zip(self.steps, self.result(), expected, strict=True):
            (a, confusion), (b, other) = ours, undisturbed
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
