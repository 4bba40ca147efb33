"""Fixtures: golden files, the toy data set, a small config."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.processes.threads import spin_briefly

if "torch" not in sys.modules:
    spin_briefly()  # as in the entry scripts

import torch

from scripts.toy_data.tree import make_toy_voc
from tests.helpers import DATA, write_config

# The networks of the tests are tiny: a second thread takes as much time again as it saves.
torch.set_num_threads(1)


def pytest_configure(config):
    """Only `-m gpu` sees GPUs: all other tests expect what a CPU computes, to the bit."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def two_threads():
    """For tests whose bounds hold for what two threads round; sums of one are others."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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
