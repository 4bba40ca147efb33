"""Reports of damaged files: what is wrong is named and left out, the rest is as it was.

Damaged are the files of one of two runs of two steps, one at a time.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from scripts import report
from scripts.reporting.reading import passes_json, read_result
from scripts.reporting.runs import find_runs
from scripts.reporting.sections import make_sections
from scripts.reporting.summary import make_report
from tests import damage
from tests.helpers import PROJECT
from tests.results import SCHEDULE, STEP_0, STEP_1, a_test
from utils.errors import UserError
from utils.history import History
from utils.metric import Evaluator, merge_future

NAMES = ("Pixel_Accuracy", "Pixel_Accuracy_Class", "Mean_Intersection_over_Union")
A, B = "overlap_2-1_A-s1", "overlap_2-1_B-s1"
MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two runs with every file that a report reads, as training and `protocol.py` write them."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in (("A-s1", "dkd"), ("B-s1", "mib")):
        for step, wide in enumerate((STEP_0, STEP_1)):
            confusion = merge_future(wide, 0)
            file = a_test(root, wide, step, name=name, method=method, memory=0, split="test")
            content = json.loads(file.read_text())
            figures = Evaluator(NAMES, range(3), range(3, len(confusion))).evaluate(confusion)
            for figure in figures.values():
                figure.pop("by_class", None)
            write(file, content | {"metrics": figures, "epoch": 2, "seconds": 1.5, "device": "cpu"})
            write(file.with_name("history.json"), history())
            config = json.loads((PROJECT / "configs/config_voc.json").read_text())
            config |= {"method": method, "name": name, "seed": 1}
            task = {"name": "2-1", "step": step, "steps": [list(ids) for ids in SCHEDULE]}
            config["data_loader"]["args"]["task"] |= task
            models = root / "models" / file.parent.relative_to(root / "log")
            models.mkdir(parents=True)
            write(models / "config.json", config)
            passes = {"all test images": wide + 1, "whole images": 2 * wide}
            write(file.with_name("protocol.json"), passes_json(read_result(file), passes))
    (root / "log" / B / "step_0/history.json").unlink()
    settings = {"global batch": 24, "data set": "voc"}
    base = {"checkpoint": "/far/away.pth", "record": {"version": "0.3", "settings": settings}}
    write(root / "models" / B / "step_0/base.json", base)
    return root


@pytest.fixture(scope="module")
def before(whole):
    """The figures of both."""
    found, left_out = figures(whole)
    assert left_out == []
    return found


@pytest.fixture
def runs(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "runs")


def history():
    epochs = [
        {"epoch": epoch, "lr": 0.1, "images_per_s": 3.5, "seconds": 2.5, "whole": True,
         "losses": {"loss": 1 / epoch, "kd": 0.5}}
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    return {"device": "cpu", "global_batch": 24, "peak_memory_mib": 100.5, "epochs": epochs}


def write(file, content):
    file.write_text(json.dumps(content))


def change(file, *path, to):
    """Set the value at a path of keys in a JSON file."""
    content = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    write(file, content)


def figures(root):
    """The figures of each run that a report shows, and what it says is left out."""
    found, left_out = find_runs([str(root)])
    sections, _ = make_sections(found)
    told = make_report(sections, left_out, [])
    by_run = {}
    for task in told["tasks"]:
        cards = {each["method"]: each["rows"] for each in task["conventions"]}
        for method in task["methods"]:
            parts = {key: method[key] for key in ("label", "summary", "iou", "curve", "flows")}
            passes = [row for row in cards[method["label"]] if row["convention"].endswith("images")]
            (run,) = method["runs"]
            by_run[run["name"]] = {
                "test": parts | {key: task[key] for key in ("dataset", "setting", "task", "last")},
                "passes": passes,
                "history.json": [method["loss"], method["cost"]],
            }
    return by_run, left_out


def last(root, name="metrics.json", run=A):
    return root / "log" / run / "step_1" / name


DAMAGED = {
    "a negative count": (("confusion", 1, 1), -5, "confusion[1][1] is -5, but must be a whole n"),
    "a fraction": (("confusion", 1, 1), 1.7, "confusion[1][1] is 1.7, but must be a whole n"),
    "text": (("confusion", 1, 1), "12", 'confusion[1][1] is "12", but must be a whole n'),
    "a boolean": (("wide", 1, 1), True, "wide[1][1] is true, but must be a whole n"),
    "NaN": (("wide", 1, 1), float("nan"), "wide[1][1] is nan"),
    "beyond int64": (("wide", 1, 1), 2**70, "wide[1][1] is a number of 71 bits"),
    "sums beyond": (("confusion", 1), [2**53] * 4, f"confusion counts more than {2**53} pixels"),
    "not square": (("confusion", 1), [1, 2], "a row of confusion has not 4 columns"),
    "too few classes": (("classes",), [], "confusion has 4 rows for 0 classes"),
    "10^4 classes": (("confusion",), [[0]] * 10**4, "confusion has 10000 rows for 4 classes"),
    "a label twice": (("classes", 1, "label_id"), 2, "a label id of its classes is there twice"),
    "another label": (("classes", 1, "label_id"), 9, "its classes are not those of the steps up t"),
    "not wide": (("wide",), STEP_1[:, :3].tolist(), "a row of wide has not 4 columns"),
    "wide of others": (("wide",), (2 * STEP_1).tolist(), "confusion is not what wide gives"),
    "wide too short": (("wide",), STEP_1[:3].tolist(), "wide has 3 rows for 4 classes"),
    "pixels": (("classes", 1, "pixels"), 7, "label id 1 has 7 pixels, but 50 are counted"),
    "an IoU": (("classes", 1, "IoU"), 99.0, "IoU of label id 1 is 99.0, but 40.0"),
    "a metric": (("metrics", NAMES[2], "old"), 7.0, f"{NAMES[2]} of old is 7.0, but 61.4"),
    "another step": (("step",), 0, "its step is 0, but it lies in step_1"),
    "a step as text": (("step",), "1", 'step is "1", but must be a whole number'),
    "flat steps": (("steps",), [1, 2, 3], "steps[0] is 1, but must be a list"),
    "no step": (("steps",), [[1, 2, 3]], "its step is 1, but there are 1"),
    "an empty step": (("steps",), [[1, 2], []], "a step without classes"),
    "other steps": (("steps",), [[1, 2], [3], [4]], "the steps is [[1, 2], [3]] in"),
    "a seed as text": (("seed",), "1", 'seed is "1", but must be a whole number'),
    "a protocol": (("protocol", "future_classes"), 7, "future_classes is 7, but must be one of 0"),
    "no protocol": (("protocol",), "published", "protocol is \"published\", but must be a block"),
    "a validation": (("split",), "val", "is of a validation"),
    "a split": (("split",), "train", 'split is "train", but must be one of'),
    "joint": (("joint",), True, "joint is True, but False in the config of the step"),
    "a memory": (("memory",), 9, "memory is 9, but 0 in the config of the step"),
    "another name": (("classes", 1, "name"), "car", "label id 1 is cat in"),
    "markup": (("method",), MARKUP, "but must be a name of letters"),
    "half a character": (("classes", 1, "name"), "\ud800", r'is "\ud800", but must be a text'),
    "a long text": (("device",), "x" * 10**5, "but must be a text"),
    "a list's hash": (("lists", "test", "sha256"), 5, "lists.test.sha256 is 5, but must be a hash"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_test_costs_its_run_alone(runs, before, what):
    path, value, reason = DAMAGED[what]
    change(last(runs), *path, to=value)
    after, left_out = figures(runs)
    assert after == {B: before[B]}
    (words,) = left_out
    assert words.startswith(f"{A} is left out: ")
    assert reason in words
    assert str(last(runs)) in words


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("epochs", 0, "seconds"), -5, "history.json: epochs[0].seconds is -5, but must be"),
        (("epochs", 0, "epoch"), 3, "history.json: epoch 2 comes after epoch 3"),
        (("epochs", 1, "epoch"), 1, "history.json: epoch 1 comes after epoch 1"),
        (("epochs", 0, "losses", "loss"), "0.5", 'epochs[0].losses.loss is "0.5"'),
        (("epochs", 0, "whole"), 1, "epochs[0].whole is 1, but must be true or false"),
        (("epochs", 0), {"epoch": 1}, "history.json: epochs[0].seconds is missing"),
        (("global_batch",), 24.0, "global_batch is 24.0, but must be a whole number"),
        (("peak_memory_mib",), float("inf"), "peak_memory_mib is inf"),
    ],
)
def test_a_damaged_history_costs_losses_and_times_alone(runs, before, path, value, reason):
    change(last(runs, "history.json"), *path, to=value)
    after, left_out = figures(runs)
    assert after[B] == before[B]
    assert after[A]["test"] == before[A]["test"]
    assert [step["step"] for step in after[A]["history.json"][0]] == [0]
    (words,) = left_out
    assert words.startswith("Left out: ")
    assert reason in words


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("of",), "0123456789abcdef", "is of another test than"),
        (("passes", "whole images", 0, 0), 7, "the passes are not those that were written"),
        (("passes", "whole images", 0, 0), "7", 'passes.whole images[0][0] is "7"'),
        (("passes", "whole images"), [[1, 2], [3, 4]], "the passes are not those"),
    ],
)
def test_damaged_passes_are_no_rows_of_the_card(runs, before, path, value, reason):
    change(last(runs, "protocol.json"), *path, to=value)
    after, left_out = figures(runs)
    assert after[A] == before[A] | {"passes": []}
    assert len(before[A]["passes"]) == 2
    assert reason in left_out[0]


def test_passes_of_older_files_must_fit_the_matrix(runs):
    file = last(runs, "protocol.json")
    written = json.loads(file.read_text())
    del written["checksum"]
    write(file, written)
    assert len(figures(runs)[0][A]["passes"]) == 2
    change(file, "passes", "whole images", to=np.eye(3, dtype=int).tolist())
    after, (words,) = figures(runs)
    assert after[A]["passes"] == []
    assert "'whole images' is no matrix of 4 × 4 counts" in words


@pytest.mark.parametrize("batch", [24, 48])
@pytest.mark.parametrize("name", ["history.json", "base.json"])
def test_a_damaged_file_makes_no_other_row(whole, tmp_path, name, batch):
    """The batch that it told is taken to be that of the runs that are equal else, if it is one."""
    for seed in (1, 2, 3):
        run = f"overlap_2-1_B-s{seed}"
        for kind in ("log", "models"):
            shutil.copytree(whole / kind / B, tmp_path / kind / run)
        for file in tmp_path.glob(f"*/{run}/step_*/*.json"):
            if file.name in ("metrics.json", "config.json"):
                change(file, "seed", to=seed)
    change(last(tmp_path, "history.json", "overlap_2-1_B-s3"), "global_batch", to=batch)
    next(tmp_path.rglob(f"*_B-s2/step_{1 if name == 'history.json' else 0}/{name}")).write_text("{")
    found, (words,) = find_runs([str(tmp_path)])
    assert name in words
    (section,), _ = make_sections(found)
    rows = [[run.last.seed for run in group.runs] for group in section.groups]
    if batch == 24:
        assert rows == [[1, 2, 3]]
    else:
        assert sorted(rows) == ([[1], [2], [3]] if name == "history.json" else [[1, 2], [3]])


def test_a_damaged_config_costs_its_run(runs):
    file = runs / "models" / A / "step_1/config.json"
    change(file, "data_loader", "args", "task", "steps", to=[1, 2])
    after, (words,) = figures(runs)
    assert [*after] == [B]
    assert "config.json: data_loader.args.task.steps[0] is 1, but must be a list." in words
    file.write_text('{"seed": "1"}')
    assert 'seed is "1", but must be a whole number' in figures(runs)[1][0]


def test_the_page_and_the_terminal_name_what_is_left_out(runs, tmp_path, capsys):
    change(last(runs), "device", to="\x1b[2J")
    last(runs, "history.json", B).write_text("[1")
    report.main([str(runs), "--out", str(tmp_path / "out"), "--pictures", "0"])
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "out/report.json").read_text())["tasks"][0]
    page = (tmp_path / "out/report.html").read_text()
    assert [method["label"] for method in told["methods"]] == ["MiB"]
    for words in (f"{A} is left out: ", f"{last(runs, 'history.json', B)}, line 1, column 3"):
        assert words in out
        assert words in page
        assert any(words in sentence for sentence in told["sentences"]["summary"])
    assert "\x1b" not in out


def test_without_a_run_that_is_whole_there_is_no_report(runs, tmp_path, capsys):
    for run in (A, B):
        change(last(runs, run=run), "seed", to=None)
    with pytest.raises(UserError, match=r"^no run is left, 2 are damaged; the first: .*seed is nu"):
        report.main([str(runs), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_too_large_is_not_read(runs, monkeypatch):
    monkeypatch.setattr("scripts.reporting.reading.LARGEST_FILE", 2 << 20)
    with open(last(runs), "a") as file:
        file.write(" " * (2 << 20))
    assert "metrics.json has more than 2 MiB; delete it" in figures(runs)[1][0]
    last(runs, run=B).write_text(last(runs).read_text())
    with pytest.raises(UserError, match=r"2 are damaged; the first: .* has more than 2 MiB"):
        find_runs([str(runs)])


def test_older_files_are_read_without_what_is_new(runs, before):
    """Keys that some version did not write yet."""
    for file in runs.rglob("metrics.json"):
        file.with_name("protocol.json").unlink()
        content = json.loads(file.read_text())
        for key in ("wide", "future_classes", "steps", "seed", "lists", "protocol", "memory"):
            del content[key]
        write(file, content)
    after, left_out = figures(runs)
    assert {run: each["test"] for run, each in after.items()} == {
        run: each["test"] for run, each in before.items()
    }
    assert left_out == []


def test_without_the_wide_matrix_classes_that_never_arrive_are_unknown(runs):
    """What their pixels were is not told, though the schedule has no further class."""
    file = last(runs)
    content = json.loads(file.read_text())
    del content["wide"]
    content["future_classes"] = [{"label_id": 9, "name": "hen"}]
    write(file, content)
    assert read_result(file).wide is None


def test_a_damaged_history_is_not_gone_on_with(tmp_path):
    (tmp_path / "history.json").write_text(json.dumps(history() | {"epochs": [{"epoch": "1"}]}))
    made = History(tmp_path, torch.device("cpu"))
    made.resume(1)
    assert made.epochs == []
    assert (tmp_path / "history.json.damaged").is_file()


def sweep(root, before, share):
    """Damage each kind of file by rule; the other run is as it was, and no figure is another one
    without a word."""
    before, _ = figures(root)
    files = [*last(root).parent.glob("*.json"), root / "models" / A / "step_1/config.json"]
    count = 0
    for file in [*sorted(files), root / "models" / B / "step_0/base.json"]:
        good, damaged = file.read_bytes(), A if A in file.parts else B
        for words, content in damage.some(damage.of_json(good.decode()), share):
            file.write_bytes(content)
            after, left_out = figures(root)
            if damaged in after and not left_out:
                assert after[damaged]["test"] == before[damaged]["test"], (file, words)
                assert after[damaged]["passes"] == before[damaged]["passes"], (file, words)
            other = B if damaged == A else A
            assert after[other] == before[other], (file, words)
            count += 1
        file.write_bytes(good)
    return count


@pytest.mark.slow
def test_files_damaged_by_rule(runs, before):
    assert sweep(runs, before, 0.05) > 100
