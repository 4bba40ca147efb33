"""Fixtures: golden files, the toy data set, a small config."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels are interpreted on the CPU; it looks when it is imported, which others do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from base.base_model import HeadPlan
from models import fused_loss
from scripts.make_toy_voc import CLASS_NAMES, make_toy_voc
from trainer.run import run
from trainer.steps import unfinished
from utils.parse_config import ConfigParser

DATA = Path(__file__).parent / "data"
PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def pieces() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "pieces.npz", allow_pickle=False))


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory) -> Path:
    """A small data set in VOC layout with 20 own classes."""
    root = tmp_path_factory.mktemp("toy") / "voc"
    make_toy_voc(root, train=48, val=24, size=(64, 48), seed=3)
    return root


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def toy_config(toy_root, tmp_path) -> Path:
    """A config file for short CPU runs on the toy data; everything it writes is in tmp_path."""
    return write_config(tmp_path / "toy.json", toy_root)


@pytest.fixture
def kernel(monkeypatch):
    """Lets the kernel serve CPU tensors as well."""
    pytest.importorskip("triton", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU, see test_gpu.py")
    monkeypatch.setattr(fused_loss, "switched_on", True)
    monkeypatch.setattr(
        fused_loss,
        "serves",
        lambda logits: fused_loss.switched_on and logits.dtype != torch.float64,
    )


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
        "trainer": {"epochs": 2, "save_dir": str(path.parent / "runs")},
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
    if steps := unfinished(parsed):
        run(*steps)
    return parsed


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
