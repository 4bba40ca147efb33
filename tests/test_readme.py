"""The README stays true: config reference, scripts, flags."""

import dataclasses
import json
import re
import subprocess

import numpy as np
import pytest

from scripts.reporting.published import published
from scripts.toy_data.shapes import CLASS_NAMES
from tests.helpers import PROJECT, train
from trainer.methods import METHODS
from utils.config_file import flatten, read_json
from utils.config_schema import FLAGS, SCHEMA
from utils.parse_config import ConfigParser

README, REFERENCE, FAITHFUL = (
    (PROJECT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/config.md", "docs/faithful.md")
)
SCRIPTS = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "scripts").rglob("*.sh"))


def reference_rows():
    """The rows of the config reference, from the schema and the shipped configs."""
    voc, ade = (
        flatten(read_json(PROJECT / f"configs/config_{name}.json"), name, strict=True)[0]
        for name in ("voc", "ade")
    )
    flags = {flag.key: ", ".join(f"`{name}`" for name in flag.names) for flag in FLAGS}
    for key, rule in SCHEMA.items():
        default = json.dumps(voc[key]) if key in voc else "-"
        if key in ade and json.dumps(ade[key]) != default:
            default += f" (ADE {json.dumps(ade[key])})"
        yield f"| `{key}` | {default} | {flags.get(key, '')} | {rule.doc} | {rule.expected()} |"


def method_rows():
    """The settings of the methods that the README's table names; others tell theirs by --help."""
    table = README.split("## Methods")[1].split("| any, with")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert len(named) >= 10
    for name in named:
        for field in dataclasses.fields(METHODS[name].Settings):
            doc, value = field.metadata["key"].doc, field.default
            default = f"{value:g}" if type(value) is float else json.dumps(value)
            yield f"| `{name}` | `hyperparameter.{field.name}` | {default} | {doc} |"


@pytest.mark.parametrize("rows", [reference_rows, method_rows])
def test_reference_is_complete(rows):
    missing = [row for row in rows() if row not in REFERENCE]
    assert not missing, "rows for docs/config.md:\n" + "\n".join(rows())


def test_reference_has_no_other_settings():
    assert {*re.findall(r"^\| `\w+` \| `hyperparameter\..*", REFERENCE, re.M)} == {*method_rows()}


def own_data():
    """The worked example of an own data set."""
    section = README.split("### Own data")[1]
    return json.loads(re.search(r"```json\n(.*?)```", section, re.DOTALL)[1])


def test_the_example_of_own_data_has_a_rate_for_each_kind_of_step(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own_data()))
    argv = ["-c", str(path), "--task_step", "all"]
    config = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
    steps = [config.at_step(step) for step in (0, 1)]
    first, later = (step["optimizer"]["args"]["lr"] for step in steps)
    assert first > later
    assert all(step["trainer"]["clip_grad_norm"] > 0 for step in steps)
    assert [step["arch"]["args"]["freeze_all_bn"] for step in steps] == [False, True]
    assert config.warnings == ()


@pytest.mark.slow
def test_the_example_of_own_data_trains(toy_root, tmp_path):
    """A tiny network from scratch, on other images; all else is as it stands."""
    tree = own_data()
    args = tree["data_loader"]["args"]
    args |= {"data_dir": str(toy_root), "class_names": list(CLASS_NAMES), "num_workers": 0}
    args["task"]["idxs_path"] = str(tmp_path)
    for kind in ("train", "val", "test"):
        args[kind] = args.get(kind, {}) | {"args": {"transform_args": {"crop_size": 32}}}
    tree["arch"]["args"] |= {"backbone": "tiny", "backbone_pretrained": False}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tree))
    parsed = train(path, "--task_step", "all", "--save_dir", str(tmp_path / "runs"), "--epochs=4")
    for step in (0, 1):
        history = json.loads((parsed.log_dir(step) / "history.json").read_text())
        assert np.isfinite([epoch["losses"]["loss"] for epoch in history["epochs"]]).all()


def test_named_files_exist():
    for name in re.findall(
        r"(?:scripts|configs|tests|trainer|base|utils|data_loader|models|docs)/[\w./-]+",
        README + REFERENCE + FAITHFUL,
    ):
        assert (PROJECT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], cwd=PROJECT, check=True)


def test_every_published_setting_has_a_script():
    expected = {
        f"scripts/voc/overlapped/train_voc_{t}.sh" for t in ["19-1", "15-5", "15-1", "10-1", "5-3"]
    }
    expected |= {f"scripts/voc/disjoint/train_voc_{t}.sh" for t in ["19-1", "15-5", "15-1"]}
    expected |= {f"scripts/ade/overlapped/train_ade_{t}.sh" for t in ["100-50", "100-10", "50-50"]}
    assert expected <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("row", "label", "runs"),
    [("DKD", "DKD", 0), ("DKD-M", "DKD-M", 0), ("DKD, mean of 5 runs", "DKD", 5)],
)
def test_published_results_are_those_that_reports_compare_with(row, label, runs):
    head = next(line for line in README.splitlines() if line.startswith("| | VOC 19-1 |"))
    line = next(line for line in README.splitlines() if line.startswith(f"| {row} | "))
    dataset = "voc"
    for task, cell in zip(head.split("|")[2:-1], line.split("|")[2:-1], strict=True):
        *name, task = task.split()
        dataset = name[0].lower() if name else dataset
        (told,) = (p for p in published(dataset, "overlap", task, label) if p.runs == runs)
        assert cell.strip() == f"{told.harmonic:.2f}/{told.overall:.2f}", task
