"""The README stays true: config reference, scripts, flags."""

import json
import re
import subprocess

import pytest

from tests.conftest import PROJECT
from utils.config_schema import FLAGS, HYPERPARAMETER, SCHEMA
from utils.parse_config import flatten, read_json

README = (PROJECT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "scripts").rglob("*.sh"))


def reference_rows():
    """The rows of the config reference, from the schema and the shipped configs."""
    voc, ade = (
        flatten(read_json(PROJECT / f"configs/config_{name}.json"), name, strict=True)[0]
        for name in ("voc", "ade")
    )
    flags = {flag.key: ", ".join(f"`{name}`" for name in flag.names) for flag in FLAGS}
    keys = list(SCHEMA)
    after = keys.index("lr_scheduler.type")
    keys[after:after] = [key for key in voc if key.startswith("hyperparameter.")]
    for key in keys:
        rule = SCHEMA.get(key, HYPERPARAMETER)
        default = json.dumps(voc[key]) if key in voc else "-"
        if key in ade and json.dumps(ade[key]) != default:
            default += f" (ADE {json.dumps(ade[key])})"
        yield f"| `{key}` | {default} | {flags.get(key, '')} | {rule.doc} |"


def test_config_reference_is_complete():
    missing = [row for row in reference_rows() if row not in README]
    assert not missing, "rows for the README:\n" + "\n".join(reference_rows())


def test_named_files_exist():
    for name in re.findall(
        r"(?:scripts|configs|tests|trainer|base|utils|data_loader)/[\w./-]+", README
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
