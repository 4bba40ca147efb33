"""`scripts/report.py` and `scripts/protocol.py` end to end, on runs of the toy data."""

import csv
import html
import json
import shutil

import numpy as np
import pytest
import torch

from scripts import protocol, report
from scripts.predicting.student import Predictor
from scripts.reporting.runs import find_runs
from tests.helpers import evaluation, train, write_config
from utils import checkpoint as files

METRIC = "Mean_Intersection_over_Union"


@pytest.fixture(scope="module")
def runs(toy_root, tmp_path_factory):
    """The folder of two runs of both steps, DKD and fine-tuning from the same base."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "toy.json", toy_root)
    flags = ("--epochs", "1", "--lr", "0.01")
    train(config, *flags, "--task_step", "all", "--name", "DKD")
    base = folder / "runs/models/overlap_15-5_DKD/step_0"
    train(config, *flags, "--task_step", "0", "--name", "FT", "--base", str(base))
    train(config, *flags, "--task_step", "1", "--name", "FT", "--method", "finetune")
    return folder / "runs"


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """Where the report of both is."""
    out = tmp_path_factory.mktemp("report")
    report.main([str(runs), "--out", str(out), "--pictures", "3", "-d", "cpu"])
    return out


def content(out):
    (task,) = json.loads((out / "report.json").read_text())["tasks"]
    return task


def test_figures_are_those_of_the_tests_to_the_last_digit(runs, written):
    names = {"DKD": "DKD", "finetune": "FT"}
    methods = {method["label"]: method for method in content(written)["methods"]}
    assert methods.keys() == names.keys()
    for label, method in methods.items():
        log = runs / f"log/overlap_15-5_{names[label]}"
        tests = [json.loads((log / f"step_{t}/metrics.json").read_text()) for t in (0, 1)]
        last = tests[1]["metrics"][METRIC]
        for key, group in {
            "old": "old",
            "new": "new",
            "hIoU": "harmonic",
            "all": "overall",
        }.items():
            assert method["summary"][key]["mean"] == last[group]
        everything = [test["metrics"][METRIC]["overall"] for test in tests]
        assert [point["mean"] for point in method["curve"]] == everything
        for step, test in enumerate(tests):
            column = [row[step] for row in method["iou"] if row[step] is not None]
            assert column == [row["IoU"] for row in test["classes"]]
        history = json.loads((log / "step_1/history.json").read_text())["epochs"]
        (terms,) = (loss["terms"] for loss in method["loss"] if loss["step"] == 1)
        (_, loss) = terms["loss"][0]
        assert loss == history[0]["losses"]["loss"]


def test_figures_are_those_of_the_log(runs, written, capsys):
    log = (runs / "log/overlap_15-5_DKD/step_1/info.log").read_text()
    line = next(words for words in log.splitlines()[::-1] if words.strip().startswith(METRIC))
    (method,) = (m for m in content(written)["methods"] if m["label"] == "DKD")
    shown = [f"{method['summary'][key]['mean']:.2f}" for key in ("old", "new", "hIoU", "all")]
    assert line.split()[-4:] == shown
    report.main([str(runs), "--out", str(written / "again"), "--pictures", "0"])
    table = capsys.readouterr().out.splitlines()
    assert next(row for row in table if row.startswith("DKD")).split()[1:5] == shown


def test_the_table_of_runs(runs, written):
    rows = list(csv.DictReader((written / "report.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["overlap_15-5_FT", "overlap_15-5_DKD"]
    methods = content(written)["methods"]
    for row, method in zip(rows, methods, strict=True):
        assert (row["method"], row["seed"]) == (method["label"], "1")
        assert float(row["all"]) == method["summary"]["all"]["mean"]
        assert row["intransigence"] == ""


def test_pictures_and_what_chose_them(written):
    task = content(written)
    assert len(task["pictures"]) == 3
    labels = ["image", "truth"] + [f"{m}, step {t}" for m in ("finetune", "DKD") for t in (0, 1)]
    for picture in task["pictures"]:
        assert [tile["label"] for tile in picture["tiles"]] == labels
        assert all(tile["src"].startswith("data:image/") for tile in picture["tiles"])
    assert "gains and loses most against" in task["sentences"]["pictures"][0]
    assert {row["name"] for row in task["legend"]} <= {row["name"] for row in task["classes"]}


def test_a_report_needs_neither_weights_nor_images(runs, written, tmp_path):
    shutil.copytree(runs / "log", tmp_path / "log")
    report.main([str(tmp_path), "--out", str(tmp_path / "out"), "-d", "cpu"])
    task = content(tmp_path / "out")
    assert task["sentences"]["pictures"][0].startswith("No pictures: ")
    assert task["pictures"] == []
    before = content(written)["methods"]
    assert [m["summary"] for m in task["methods"]] == [m["summary"] for m in before]


def test_a_protocol_card(runs, tmp_path, capsys):
    """Its passes are what evaluations of just these images count; a second call makes none."""
    weights = runs / "models/overlap_15-5_DKD/step_0/checkpoint-epoch1.pth"
    protocol.main(["-r", str(weights), "-d", "cpu"])
    card = capsys.readouterr().out
    (run,), _ = find_runs([str(runs / "log/overlap_15-5_DKD")])
    result = run.results[0]
    whole = train(
        None,
        *("-r", str(weights), "-d", "cpu", "--save_dir", str(tmp_path)),
        *("--set", "data_loader.args.test.args.transform=false"),
        *("--set", "data_loader.args.test.batch_size=1"),
        mode="eval",
    )
    assert result.passes["whole images"].tolist() == evaluation(whole)["wide"]
    more = result.passes["all test images"] - result.wide
    assert (more >= 0).all()
    assert more[1:16].sum() == 0, "images that the test leaves out hold no class seen"
    assert more[16:].sum() > 0
    mean = result.content["metrics"][METRIC]["overall"]
    first = next(line for line in card.splitlines() if line.startswith("* as evaluated"))
    assert first.split()[-2:] == [f"{mean:.2f}", "+0.00"]
    assert "conventions alone move it by" in card
    file = runs / "log/overlap_15-5_DKD/step_0/protocol.json"
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    protocol.main(["-r", str(weights), "-d", "cpu"])
    assert capsys.readouterr().out == card
    assert file.stat().st_mtime_ns == before


def test_weights_of_elsewhere_are_tested_once_as_an_evaluation_does(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "checkpoint-epoch1.pth"):
        shutil.copy(runs / "models/overlap_15-5_DKD/step_0" / name, tmp_path)
    protocol.main(["-r", "checkpoint-epoch1.pth", "-d", "cpu"])
    (file,) = tmp_path.rglob("metrics.json")
    own = json.loads((runs / "log/overlap_15-5_DKD/step_0/metrics.json").read_text())
    made = json.loads(file.read_text())
    assert (made["epoch"], made["wide"]) == (own["epoch"], own["wide"])
    report.main([str(file.parent), "--out", "out", "--pictures", "21", "-d", "cpu"])
    task = content(tmp_path / "out")
    assert len(task["pictures"]) == 21, "the weights are those that were tested"
    future = {row["name"] for row in task["legend"] if row["step"] is None}
    assert future
    assert future <= {row["name"] for row in own["future_classes"]}


def test_passes_of_other_weights_are_not_shown(runs, tmp_path):
    log = tmp_path / "log/overlap_15-5_DKD/step_0"
    shutil.copytree(runs / "log/overlap_15-5_DKD/step_0", log)
    (log / "protocol.json").write_text(
        json.dumps({"of": "another test", "passes": {"whole images": np.eye(3).tolist()}})
    )
    (run,), _ = find_runs([str(log)])
    assert run.results[0].passes == {}


def card(runs, capsys):
    """What `protocol.py` prints of a copy of a step 0, and the folder of its log."""
    weights = runs / "models/overlap_15-5_DKD/step_0/checkpoint-epoch1.pth"
    protocol.main(["-r", str(weights), "-d", "cpu"])
    return capsys.readouterr(), runs / "log/overlap_15-5_DKD/step_0"


def broken(file, key):
    content = json.loads(file.read_text())
    if key == "confusion":
        content["confusion"][1][1] = -5
    elif key == "passes":
        content["passes"]["whole images"][1][1] += 1
    elif key == "of":
        content["of"] = 0
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["confusion", "step"])
def test_a_damaged_test_is_told_and_made_anew(runs, tmp_path, capsys, monkeypatch, key):
    """As an evaluation of these weights, which a second call finds."""
    monkeypatch.chdir(tmp_path)
    own = shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("protocol.json"))
    before, log = card(own, capsys)
    assert before.err == ""
    if key == "step":  # whole, but of the other step
        shutil.copy(log.with_name("step_1") / "metrics.json", log)
    else:
        broken(log / "metrics.json", key)
    after, _ = card(own, capsys)
    assert after.out == before.out
    assert after.err.startswith(f"not used: {log / 'metrics.json'}")
    (made,) = tmp_path.rglob("eval/*/protocol.json")
    status = made.stat().st_mtime_ns
    assert card(own, capsys)[0].out == before.out
    assert made.stat().st_mtime_ns == status


@pytest.mark.parametrize("key", ["of", "passes"])
def test_damaged_passes_are_told_and_made_anew(runs, tmp_path, capsys, key):
    own = shutil.copytree(runs, tmp_path / "runs")
    before, log = card(own, capsys)
    whole = (log / "protocol.json").read_text()
    broken(log / "protocol.json", key)
    after, _ = card(own, capsys)
    assert after.out == before.out
    assert after.err.startswith(f"not used: {log / 'protocol.json'}")
    assert (log / "protocol.json").read_text() == whole


# ------------------------------------------- tests and the weights that lie there
def spoil(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("step", "change", "says"),
    [
        (1, {"weights_sha256": "0" * 64}, "step_1/metrics.json is of other weights than"),
        (1, {"previous_sha256": "1" * 64}, "were trained from other weights of step 0 than those"),
        (0, {"weights_sha256": None, "epoch": 7}, "is of epoch 7, but there lies"),
    ],
)
def test_a_test_of_other_weights_than_those_that_lie_there_is_left_out(
    runs, tmp_path, capsys, step, change, says
):
    own = shutil.copytree(runs, tmp_path / "runs")
    file = own / f"log/overlap_15-5_FT/step_{step}/metrics.json"
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    report.main([str(own), "--out", str(tmp_path / "out"), "--pictures", "0"])
    (task,) = json.loads((tmp_path / "out/report.json").read_text())["tasks"]
    assert [method["label"] for method in task["methods"]] == ["DKD"]
    (left,) = [words for words in task["sentences"]["summary"] if "left out" in words]
    assert left.startswith("overlap_15-5_FT is left out: ")
    assert says in left


def test_other_weights_of_the_same_name_are_tested_anew_for_the_card(runs, tmp_path, capsys):
    own = shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("protocol.json"))
    before, log = card(own, capsys)
    weights = own / "models/overlap_15-5_DKD/step_0/checkpoint-epoch1.pth"
    checkpoint = files.load(weights)
    checkpoint["state_dict"]["cls.1.bias"][3] += 50
    weights.unlink()
    torch.save(checkpoint, weights)
    after, _ = card(own, capsys)
    assert after.out != before.out
    (made,) = own.rglob("eval/*/metrics.json")
    told = json.loads(made.read_text())
    assert told["weights_sha256"] == files.hash_of(weights)
    assert not (log / "protocol.json").exists() or passes_of(log) != passes_of(made.parent)


def passes_of(folder):
    return json.loads((folder / "protocol.json").read_text())["of"]


def test_what_changed_on_the_way_is_told(runs, tmp_path):
    own = shutil.copytree(runs, tmp_path / "runs")
    log = own / "log/overlap_15-5_FT"
    spoil(log / "step_0/metrics.json", lambda c: c["lists"]["test"].update(contents="ab" * 32))
    spoil(log / "step_1/metrics.json", lambda c: c.update(lengthened=[3]))
    report.main([str(own), "--out", str(tmp_path / "out"), "--pictures", "0"])
    (task,) = json.loads((tmp_path / "out/report.json").read_text())["tasks"]
    warnings = " ".join(task["warnings"])
    assert "overlap_15-5_FT: what the files of the test data hold changed on the way." in warnings
    assert "overlap_15-5_FT, step 1, was lengthened after epoch 3, where its learning" in warnings


def test_broken_weights_cost_the_pictures_of_their_run(runs, written, tmp_path):
    own = shutil.copytree(runs, tmp_path / "runs")
    weights = own / "models/overlap_15-5_FT/step_1/checkpoint-epoch1.pth"
    weights.unlink()
    weights.write_text("404 Not Found")
    report.main([str(own), "--out", str(tmp_path / "out"), "--pictures", "3", "-d", "cpu"])
    task = content(tmp_path / "out")
    labels = ["image", "truth", "DKD, step 0", "DKD, step 1"]
    assert [tile["label"] for tile in task["pictures"][0]["tiles"]] == labels
    (_, words) = task["sentences"]["pictures"]
    assert words.startswith(f"No pictures of overlap_15-5_FT: checkpoint {weights} ")
    assert words in html.unescape((tmp_path / "out/report.html").read_text())
    before = content(written)["methods"]
    assert [m["summary"] for m in task["methods"]] == [m["summary"] for m in before]


def test_a_data_set_that_one_config_misses_is_that_of_another(runs, tmp_path):
    own = shutil.copytree(runs, tmp_path / "runs")
    for file in (own / "models/overlap_15-5_DKD").glob("step_*/config.json"):
        config = json.loads(file.read_text())
        config["data_loader"]["args"]["data_dir"] = str(tmp_path / "moved")
        file.write_text(json.dumps(config))
    report.main([str(own), "--out", str(tmp_path / "out"), "--pictures", "3", "-d", "cpu"])
    assert len(content(tmp_path / "out")["pictures"]) == 3


def test_a_broken_image_costs_its_picture(runs, toy_root, tmp_path):
    root = shutil.copytree(toy_root, tmp_path / "voc")
    name = (root / "ImageSets/Segmentation/val.txt").read_text().split()[3]
    (image,) = (root / "JPEGImages").glob(f"{name}.*")
    image.write_bytes(image.read_bytes()[:200])
    flags = ["--pictures", "3", "-d", "cpu", "--data_dir", str(root)]
    report.main([str(runs), "--out", str(tmp_path / "out"), *flags])
    task = content(tmp_path / "out")
    assert len(task["pictures"]) == 3
    how, words = task["sentences"]["pictures"]
    assert how.startswith("Of 23 test images")
    assert words.startswith("1 more cannot be read; the first: ")
    assert name in words


def test_images_too_large_for_the_memory_cost_their_pictures(runs, toy_root, tmp_path, monkeypatch):
    first = (toy_root / "ImageSets/Segmentation/val.txt").read_text().split()[0]
    network, calls = Predictor._network, []

    def small(self, pixels):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return network(self, pixels)

    monkeypatch.setattr(Predictor, "_network", small)
    report.main([str(runs), "--out", str(tmp_path / "out"), "--pictures", "3", "-d", "cpu"])
    task = content(tmp_path / "out")
    assert len(task["pictures"]) == 3
    how, words = task["sentences"]["pictures"]
    assert how.startswith("Of 8 test images")
    assert f"{first}, " in words
    assert "there is too little memory for 16 image(s) of 48×48 pixels" in words


def test_a_page_without_pictures_says_why(runs, tmp_path):
    shutil.copytree(runs / "log", tmp_path / "log")
    report.main([str(tmp_path), "--out", str(tmp_path / "out"), "-d", "cpu"])
    assert "No pictures: overlap_15-5_FT: there is no checkpoint-epoch*.pth of " in (
        (tmp_path / "out/report.html").read_text()
    )
