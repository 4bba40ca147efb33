"""Fixtures: golden files, the toy data set, a small config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.make_toy_voc import CLASS_NAMES, make_toy_voc

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


@pytest.fixture(scope="session")
def class_names() -> list[str]:
    return list(CLASS_NAMES)
