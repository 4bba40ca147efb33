"""What tests of whole runs share: where files lie, a config, a run, its figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from base.base_model import HeadPlan
from scripts.toy_data.shapes import CLASS_NAMES
from trainer.entry import step_configs
from trainer.run import run
from utils.parse_config import ConfigParser

DATA = Path(__file__).parent / "data"
PROJECT = Path(__file__).parent.parent
# The methods that the tests know; another one comes with a test of its own.
PUBLISHED = ("dkd", "finetune", "ft", "lwf", "lwf_mc", "ilt", "mib", "plop", "sdr", "ssul")
NO_GPU = "needs a CUDA device, and -m gpu"


def dkd_heads(*sizes: int) -> HeadPlan:
    """The heads of DKD's network: the auxiliary one, then one per step."""
    return HeadPlan(sizes, detached_first=True)


def write_config(path: Path, data_dir: Path, **task) -> Path:
    """Write the config of a short CPU run of a tiny model beside `path`."""

    def block(crop, batch_size):
        return {"args": {"transform_args": {"crop_size": crop}}, "batch_size": batch_size}

    config = {
        "name": "toy",
        "arch": {"args": {"backbone": "tiny", "backbone_pretrained": False}},
        "data_loader": {
            "args": {
                "data_dir": str(data_dir),
                "class_names": list(CLASS_NAMES),
                "task": {"name": "15-5", "idxs_path": str(path.parent / "lists"), **task},
                "train": block(32, 8),
                "val": block(48, 8),
                "test": block(48, 8),
                "num_workers": 0,
            }
        },
        "optimizer": {"args": {"lr": 0.001}},
        "trainer": {"epochs": 2, "save_dir": str(path.parent / "runs"), "keep": "all"},
    }
    path.write_text(json.dumps(config))
    return path


def train(config: Path, *flags: str, script: str = "voc", mode: str = "train") -> ConfigParser:
    """What an entry script does, in this process; returns the effective configuration."""
    parsed = ConfigParser.from_args(
        mode,
        f"configs/config_{script}.json",
        argv=[*(["-c", str(config)] if config else []), *flags],
    )
    run(*step_configs(parsed))
    return parsed


def after(count, method, action):
    """`method`, which runs `action` when it has been called `count` times."""
    calls = []

    def counted(*args, **kwargs):
        result = method(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            action()
        return result

    return counted


def send(number):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def evaluation(parsed: ConfigParser) -> dict:
    """The one `metrics.json` of weights that were named with -r."""
    (file,) = (parsed.log_dir() / "eval").glob("*/metrics.json")
    return json.loads(file.read_text())


def ade_presence() -> dict[str, tuple[list[str], np.ndarray]]:
    """Split → ids and presence table [images, 256] that the published ADE lists determine.

    They tell which groups of classes a mask holds; its first class stands for each of them.
    """
    stored = np.load(DATA / "ade_presence_groups.npz", allow_pickle=False)
    tables = {}
    for split in ("train", "val"):
        packed = stored[split]
        table = np.zeros((len(packed), 256), bool)
        groups = np.unpackbits(packed, axis=1)[:, : len(stored["groups"])].astype(bool)
        table[:, stored["groups"][:, 0]] = groups
        tables[split] = [f"ADE_{split}_{n:08d}" for n in range(1, len(packed) + 1)], table
    return tables
