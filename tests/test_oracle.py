"""The oracle: that it answers the same twice stands in what it compares; here, that it can fail."""

import json
import subprocess
import sys

import pytest
import torch

from scripts.oracle import RUNS, content, differences, digest
from tests.helpers import PROJECT


def test_digest_sees_values_types_shapes_and_names():
    state = {"weight": torch.tensor([[1.0, 2.0]]), "step": 3}
    others = [
        {"weight": torch.tensor([[1.0, 2.0000002]]), "step": 3},
        {"weight": torch.tensor([[1.0, 2.0]]).double(), "step": 3},
        {"weight": torch.tensor([1.0, 2.0]), "step": 3},
        {"bias": torch.tensor([[1.0, 2.0]]), "step": 3},
        {"weight": torch.tensor([[1.0, 2.0]]), "step": 4},
    ]
    assert digest(state) == digest({"weight": torch.tensor([[1.0, 2.0]]), "step": 3})
    assert len({digest(each) for each in (state, *others)}) == 6


def test_content_leaves_out_what_is_another_each_time(tmp_path):
    file = tmp_path / "history.json"
    file.write_text(json.dumps({"loss": 2.5, "seconds": 3.25, "weights": f"{tmp_path}/a.pth"}))
    assert content(file, tmp_path) == {"loss": 2.5, "weights": "ROOT/a.pth"}


def test_differences_name_the_place():
    earlier = {"runs": {"MiB": [[0]]}, "files": {"a.pth": {"epoch": 1}}}
    answer = {"runs": {"MiB": [[2]]}, "files": {"a.pth": {"epoch": 1}, "b.pth": None}}
    assert differences(earlier, earlier) == []
    assert differences(earlier, answer) == [
        " / runs / MiB / 0 / 0: 0 → 2",
        " / files / b.pth: nothing → None",
    ]


@pytest.mark.slow
def test_the_answer_of_this_project(tmp_path):
    script = [sys.executable, "scripts/oracle.py", "--out", str(tmp_path / "answer.json")]
    subprocess.run(script, cwd=PROJECT, check=True)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["runs"] == {name: [[0]] for name in RUNS} | {"stopped": [[75], [0]]}
    assert all(codes == [0] for codes in answer["scripts"].values())
    assert all(code == 2 for code, *_ in answer["wrong input"].values())
    weights = {
        path.split("/")[3].removeprefix("overlap_15-5_"): content["state_dict"]
        for path, content in answer["files"].items()
        if path.endswith("/step_1/checkpoint-epoch2.pth")
    }
    assert weights.keys() == RUNS.keys()
    assert weights["stopped"] == weights["DKD-M"]
    assert len({*weights.values()}) == len(RUNS) - 1
