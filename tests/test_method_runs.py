"""Whole runs of the methods at step 1: stopped and gone on with, and by two processes as by one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_method import BaseMethod
from tests.helpers import train, write_config
from trainer.methods import METHODS
from trainer.plan import RunPlan, plan_run
from trainer.run import work
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.parse_config import ConfigParser
from utils.processes.launch import launch
from utils.processes.signals import Interrupted
from utils.ranks import Ranks

FROM_FT = ("ft", "lwf", "lwf_mc", "ilt", "mib", "plop")  # FT's step 0 is that of its family
SOME = ("plop", "sdr", "ssul")  # those that remember something, and replay
ALL = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in FROM_FT if name not in SOME),
    *SOME,
]
RUN = "models/overlap_15-5_toy"
# Terms that need sums over ranks weigh enough to be seen; L_sp is per process.
SDR = {"match": 1, "attract": 1, "repulse": 1, "sparse": 0}


class Place:
    """Where the runs of these tests lie: step 0 of each method, and a config for each."""

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        self.config = write_config(folder / "toy.json", root)
        tree = json.loads(self.config.read_text())
        tree["trainer"]["epochs"] = 1
        args = tree["data_loader"]["args"]
        args["train"] = {"args": {"transform_args": {"crop_size": 64}}, "batch_size": 4}
        self.tree = tree
        self.maps = folder / "maps"
        self.maps.mkdir()
        for path in (root / "SegmentationClassAug").iterdir():
            mask = np.asarray(Image.open(path))
            Image.fromarray(np.where(mask % 3 == 1, mask, np.uint8(0))).save(self.maps / path.name)

    def start(self, method: str) -> Path:
        """The folder of the runs that continue from one step 0."""
        first = "ft" if method in FROM_FT else method
        folder = self.folder / first
        if not folder.exists():
            train(*self.line(first, folder, 0))
        return folder

    def line(self, method: str, folder: Path, step: int, **changes: Any) -> tuple[Any, ...]:
        """A config and flags of a step in `folder`."""
        tree = json.loads(json.dumps(self.tree))
        tree |= changes
        tree["trainer"]["save_dir"] = str(folder)
        if method == "ssul":
            tree["data_loader"]["args"] |= {"saliency_dir": str(self.maps)}
            if step:
                memory = {"mem_size": 6, "mix": "half_batch", "labels": "all_seen"}
                tree["data_loader"]["args"]["memory"] = memory
        path = folder.parent / f"{folder.name}.json"
        path.write_text(json.dumps(tree))
        frozen = ("--freeze_bn",) if step else ()
        return (path, "--method", method, "--task_step", str(step), *frozen)

    def fresh(self, method: str, name: str) -> Path:
        """A folder in which step 0 is done."""
        folder = self.folder / f"{method}_{name}"
        source = self.start(method)
        (folder / RUN).mkdir(parents=True)
        shutil.copytree(source / RUN / "step_0", folder / RUN / "step_0")
        return folder


@pytest.fixture(scope="module")
def place(toy_root, tmp_path_factory) -> Place:
    return Place(toy_root, tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def alone(place):
    """The checkpoint of a run of step 1 that nothing disturbs, by one process."""
    known: dict[str, dict[str, Any]] = {}

    def run(method: str) -> dict[str, Any]:
        if method not in known:
            known[method] = final(train(*place.line(method, place.fresh(method, "alone"), 1)))
        return known[method]

    return run


def final(parsed: ConfigParser) -> dict[str, Any]:
    return files.load(parsed.step_dir() / "checkpoint-epoch1.pth")


@pytest.mark.parametrize("method", ALL)
def test_a_stopped_step_goes_on_to_the_same_bits(method, place, alone, monkeypatch):
    whole = alone(method)
    line = place.line(method, place.fresh(method, "stopped"), 1)
    each = Trainer.train_step

    def stop_in_the_middle(self: Trainer, *args: Any) -> dict[str, torch.Tensor]:
        values = each(self, *args)
        if self.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_in_the_middle)
        with pytest.raises(Interrupted, match="iteration 2 of the next"):
            train(*line)
    with monkeypatch.context() as patch:
        patch.setattr(METHODS[method], "begin_step", None)  # is not to be called again
        again = final(train(*line, "-r", "auto"))
    for kind in ("state_dict", "method_state"):
        assert again[kind].keys() == whole[kind].keys()
        for name, value in whole[kind].items():
            assert torch.equal(again[kind][name], value), name
    remembered = {"plop": {"thresholds"}, "sdr": {"prototypes", "counts"}}
    assert whole["method_state"].keys() == remembered.get(method, set())
    assert all(value.any() for value in whole["method_state"].values())


# ------------------------------------------------------------------------------- several processes
def without_dropout(self: BaseMethod) -> bool:
    return False


def work_in_turn(jobs: Sequence[RunPlan], ranks: Ranks) -> None:
    """One process of several runs, one after the other."""
    torch.set_num_threads(1)
    METHODS["ssul"].dropout = property(without_dropout)  # of each process's own numbers
    for job in jobs:
        work(job, ranks)


@pytest.mark.slow
def test_two_processes_are_one(place, alone, monkeypatch):
    """Frozen BatchNorm and no dropout: weights and what a method remembers, but for rounding.

    Without SDR's L_sp, whose largest feature of a class is that of one process's images.
    """
    monkeypatch.setattr(METHODS["ssul"], "dropout", property(without_dropout))
    jobs, ones = [], {}
    for method in (*FROM_FT, "sdr", "ssul"):
        changes = {"hyperparameter": SDR} if method == "sdr" else {}
        if method in FROM_FT:
            ones[method] = alone(method)
        else:
            line = place.line(method, place.fresh(method, "one"), 1, **changes)
            ones[method] = final(train(*line))
        changes |= {"n_gpu": 2, "multiprocessing_distributed": True}
        path, *flags = place.line(method, place.fresh(method, "two"), 1, **changes)
        argv = ["-c", str(path), *flags, "-d", "cpu", "--bs", "2"]
        parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
        jobs.append(plan_run([parsed]))
    launch(work_in_turn, jobs, jobs[0].launch)
    for (method, one), job in zip(ones.items(), jobs, strict=True):
        two = final(job.first.config)
        assert len(two["rng"]) == 2
        for kind, atol in (("state_dict", 1e-5), ("method_state", 1e-4)):
            assert two[kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(
                    two[kind][name],
                    value,
                    rtol=1e-3,
                    atol=atol,
                    msg=lambda text, at=f"{method}, {name}": f"{at}: {text}",
                )
