"""The benchmark: every section runs, both ways give the same numbers, no figure is missing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.fast import losses as fast_loss
from scripts import benchmark
from scripts.benchmarking import growth, loss, measure
from scripts.benchmarking.memory import extra_memory
from scripts.benchmarking.plan import BOTH, Plan, make_plan
from utils.errors import UserError
from utils.ranks import SINGLE

CPU = torch.device("cpu")
SMALL = Plan(
    CPU,
    rounds=1,
    budget=0,
    pictures=2,
    masks=8,
    backbone="tiny",
    crop=64,
    losses=((3, 2, 32),),
    softmax=((3, 2, 32),),
    pod=64,
    growth=("tiny", 64),
    grown=((3, 2), (3, 1, 1)),
)
HAS_LIMIT = {"data", "step", "eval", "scan", "growth"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "make_plan", lambda device, quick: replace(SMALL, device=device))
    # Without the seconds that processes take to start.
    for section in (loss, growth):
        monkeypatch.setattr(section, "extra_memory", lambda *args: {"plain": 2.0, "ours": 1.0})
    monkeypatch.setattr(growth, "launch", lambda worker, job, plan: worker(job, SINGLE))
    monkeypatch.setattr(growth, "peak_increase", lambda call, device: 1.0)


def test_every_section_fills_its_rows(small, tmp_path, capsys):
    """Each section ends the program when the plain way and ours differ."""
    file = tmp_path / "figures.json"
    rows = benchmark.main(["--device", "cpu", "--json", str(file)])
    assert {row.section for row in rows} == set(benchmark.SECTIONS)
    assert {row.section for row in rows if row.limit is not None} == HAS_LIMIT
    assert all(row.plain is not None or "process" in row.what or "each" in row.what for row in rows)
    for row in rows:
        values = [row.ours]
        values += [] if row.plain is None else [row.plain, row.ratio]
        values += [] if row.limit is None else [row.limit, row.share]
        assert all(math.isfinite(value) and value > 0 for value in values), row
    written = json.loads(file.read_text())
    assert [row["what"] for row in written["rows"]] == [row.what for row in rows]
    assert written["rows"] == [row.as_dict() for row in rows]
    assert written["machine"]["torch"] == torch.__version__
    assert {"cpu", "cores", "device"} <= written["machine"].keys()
    lines = capsys.readouterr().out.splitlines()[-len(rows) - 1 :]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert lines[0].split() == ["what", "unit", "plain", "ours", "ratio", "limit", "of", "limit"]


@pytest.mark.parametrize(("old", "new"), [(1, 1), (244, 10), (990, 10)])
def test_losses_and_gradients_agree(old, new):
    plain, ours = (loss.make_loss(way, 64, old, new, CPU)() for way in ("plain", "ours"))
    terms = {"mbce", "ac", "kd", "dkd_pos", "dkd_neg"}
    assert plain.keys() == ours.keys() == terms | {"logits slope", "pos slope", "neg slope"}
    for name, values in plain.items():
        measure.must_agree(name, values, ours[name], 1e-4)
    assert plain["mbce"].shape == (new,)
    assert plain["logits slope"].shape == (2, 1 + old + new, 4, 4)


def test_another_loss_is_noticed(small, monkeypatch):
    """The fast way of one term is wrong; the definition it is measured with is not."""
    write = fast_loss.Scores.write
    monkeypatch.setattr(
        fast_loss.Scores, "write", lambda self, chunk, out: (write(self, chunk, out), out.mul_(1.1))
    )
    with pytest.raises(SystemExit, match="loss, kd: the plain way and ours differ by "):
        loss.measure_loss(SMALL)


def test_agreement():
    measure.must_agree("same", np.array([0, 1]), torch.tensor([0.0, 1.0]), 0)
    measure.must_agree("close", np.array([0, 100.0]), np.array([0.5, 100.0]), 0.01)
    for other in ([0, 1.1], [0, np.nan], [0.0]):
        with pytest.raises(SystemExit):
            measure.must_agree("other", np.array([0, 1.0]), np.array(other), 0.01)


@pytest.mark.slow
def test_memory_of_a_call():
    """In fresh processes: upsampling 60 classes to 256×256 holds at least one such tensor."""
    used = extra_memory(SMALL, BOTH, loss.make_loss, 256, 50, 10)
    assert used["plain"] > 2 * 50 * 256**2 * 4 / 2**20
    assert 0 < used["ours"] < used["plain"]


@pytest.mark.slow
def test_two_processes_share_a_batch():
    """Started for real: each trains on its half, and together they have the loss of one."""
    (alone, seconds), (half, _) = (growth.in_group(SMALL, count, memory=False) for count in (1, 2))
    assert seconds > 0
    measure.must_agree("loss", alone, half, 1e-5)


def test_rows_know_what_is_better():
    rate = measure.Row("s", "w", "images/s", plain=10, ours=20, limit=40)
    time = measure.Row("s", "w", "ms", plain=40, ours=20, limit=10)
    assert (rate.ratio, rate.share) == (time.ratio, time.share) == (2, 0.5)
    alone = measure.Row("s", "w", "MiB", plain=None, ours=0)
    assert alone.ratio is alone.share is None
    assert measure.table([alone]).splitlines()[1].split() == ["s", "w", "MiB", *"-0---"]


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert measure.in_turn(calls, rounds=2, budget=0, warm=1).keys() == calls.keys()
    assert order == [*"ababab"]


@pytest.mark.parametrize("room", [0, 1, 2, 5, 16, 100, 1023, 1024, 5000])
def test_largest_batch(room):
    assert measure.largest(lambda batch: batch <= room) == min(room, 1024)


def test_cpu_seconds(small, capsys):
    (row,) = benchmark.main(["data", "--device", "cpu", "--cpu_time"])
    assert row.ours > 0
    assert "seconds CPU" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["dat"], ["--device", "gpu"], ["--device", "cuda:99"]])
def test_wrong_arguments(argv):
    with pytest.raises(UserError, match=r"valid|GPUs"):
        benchmark.main(argv)


def test_plans():
    quick, full = (make_plan(CPU, quick) for quick in (True, False))
    assert (quick.backbone, full.backbone) == ("tiny", "resnet101")
    cuda = make_plan(torch.device("cuda"), False)
    assert len(cuda.shapes) == 3
    assert max(map(sum, full.grown)) == 254
