"""The `scan` part of benchmark.py: how long the masks of a data set take to scan.

    python scripts/benchmark_scan.py ROOT ROUNDS BUDGET

Called by `benchmark.py`, which reads the one line of JSON that it prints: seconds of each way, and
the number of cores. A file of its own, because every process of the limit imports the main file
again and must not wait for torch. Knows no model.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from data_loader.splits import presence_table
from data_loader.voc import VOC
from scripts.benchmarking.measure import in_turn, must_agree
from utils.errors import one_sentence_errors
from utils.machine import cores


def plain_scan(dataset: VOC) -> np.ndarray:
    """[images, label ids] bool: those of one mask after the other, in this process."""
    table = np.zeros((len(dataset), 256), dtype=bool)
    for row, entry in enumerate(dataset.entries):
        table[row, np.unique(np.array(Image.open(entry.mask)))] = True
    return table[:, list(dataset.ids)]


def decode(path: Path) -> None:
    """What no scan can do without."""
    Image.open(path).load()


def measure(root: Path, rounds: int, budget: float) -> dict[str, float]:
    """Seconds of the plain way, ours without and with cache, and decoding alone."""
    dataset = VOC("train", str(root))
    masks = [entry.mask for entry in dataset.entries]
    processes = cores()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        list(pool.map(decode, masks[: 2 * processes]))  # what starting takes is not in the limit
        fresh, cached = itertools.count(), Path(folder) / "cached"
        must_agree("scan", plain_scan(dataset), presence_table(dataset, cached), 0)
        calls = {
            "plain": lambda: plain_scan(dataset),
            "ours": lambda: presence_table(dataset, Path(folder) / str(next(fresh))),
            "limit": lambda: list(pool.map(decode, masks, chunksize=64)),
            "cached": lambda: presence_table(dataset, cached),
        }
        return {**in_turn(calls, rounds, budget), "cores": processes}


if __name__ == "__main__":
    with one_sentence_errors():
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
