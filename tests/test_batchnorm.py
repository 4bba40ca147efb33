"""The momentum of the backbone's BatchNorm: of each recipe, in the network, in what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from models.model import DeepLabV3
from scripts.reporting.sections import settings_of
from tests.helpers import DATA, dkd_heads, train
from trainer.announce import _compare_with_recipe
from trainer.entry import step_configs
from trainer.plan import plan_run
from trainer.provenance import differences
from utils import checkpoint as files
from utils.config_schema import OLDER
from utils.errors import UserError
from utils.logger import log
from utils.parse_config import ConfigParser

KEY = "arch.args.backbone_bn_momentum"
AUTHORS = {"dkd": 0.01, "finetune": 0.01, "ssul": 0.01, "sdr": 0.0003}
AUTHORS |= dict.fromkeys(("ft", "lwf", "lwf_mc", "ilt", "mib", "plop"), 0.1)


def momentum_of(config: ConfigParser) -> float:
    return config["arch"]["args"]["backbone_bn_momentum"]


@pytest.mark.parametrize("method", AUTHORS)
@pytest.mark.parametrize("dataset", ["voc", "ade"])
@pytest.mark.parametrize("step", ["0", "1"])
def test_each_method_has_its_authors_momentum(method, dataset, step):
    argv = ["--method", method, "--task_step", step]
    config = ConfigParser.from_args("train", f"configs/config_{dataset}.json", argv=argv)
    assert momentum_of(config) == AUTHORS[method]
    assert config["use_amp"] is (method in ("dkd", "finetune", "plop", "ssul"))


def test_the_backbone_has_it_and_the_decoder_that_of_pytorch():
    model = DeepLabV3(dkd_heads(1, 3), backbone="tiny", backbone_bn_momentum=0.25)
    for part, momentum in ((model.backbone, 0.25), (model.aspp, 0.1)):
        assert {m.momentum for m in part.modules() if isinstance(m, _BatchNorm)} == {momentum}
    norm = model.backbone.bn1
    before = norm.running_mean.clone()
    images = torch.randn(2, 3, 32, 32)
    model.train()(images)
    batch = model.backbone.conv1(images).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.75 * before + 0.25 * batch)


@pytest.mark.parametrize(("method", "tells"), [("dkd", True), ("ssul", False)])
def test_ssul_was_published_with_statistics_of_each_gpu(method, tells, caplog, monkeypatch):
    """So what a process sees of the batch is no difference from its authors' run."""
    monkeypatch.setattr(log, "propagate", True)
    config = ConfigParser.from_args("train", "configs/config_voc.json", argv=["--method", method])
    data = SimpleNamespace(global_batch=32, norm_batch=8)
    _compare_with_recipe(config.recipe, config, data)
    assert ("BatchNorm sees 8 images at a time instead of 32" in caplog.text) is tells


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_a_config_without_it_means_one_hundredth(dataset, tmp_path):
    released = json.loads((DATA / f"published_config_{dataset}.json").read_text())
    (tmp_path / "w.pth").touch()
    (tmp_path / "config.json").write_text(json.dumps(released | {"method": "mib"}))
    for mode in ("train", "eval"):
        argv = ["-r", str(tmp_path / "w.pth")]
        config = ConfigParser.from_args(mode, f"configs/config_{dataset}.json", argv=argv)
        assert momentum_of(config) == 0.01
    model = DeepLabV3(dkd_heads(1, 3), backbone="tiny")
    assert model.backbone.bn1.momentum == 0.01


@pytest.mark.parametrize(("value", "fits"), [(0, False), (1.5, False), ("0.1", False), (1, True)])
def test_its_range(value, fits, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"arch": {"args": {"backbone_bn_momentum": value}}}))
    argv = ["-c", str(file)]
    if fits:
        assert momentum_of(ConfigParser.from_args("train", "configs/config_voc.json", argv=argv))
        return
    with pytest.raises(UserError, match=rf"{KEY} is .*, but must be a number > 0 and <= 1"):
        ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)


def test_a_record_without_it_counts_as_one_hundredth():
    def record(**settings: Any) -> dict[str, Any]:
        return {"version": "1", "data": None, "settings": settings}

    def found(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
        return differences(record(**here), record(**there))

    assert found({KEY: 0.01}, {}) == found({}, {KEY: 0.01}) == found({}, {}) == []
    assert found({KEY: 0.1}, {}) == [f"{KEY} is 0.1 here and 0.01 there"]
    assert found({}, {KEY: 0.1}) == [f"{KEY} is 0.01 here and 0.1 there"]
    assert OLDER == {KEY: 0.01}


def without(path: Path) -> None:
    """Make what an older version wrote of a finished or begun step: without the key."""
    checkpoint = files.load(path)
    assert checkpoint["record"]["settings"].pop(KEY) == 0.01
    torch.save(checkpoint, path)
    config = path.with_name("config.json")
    tree = json.loads(config.read_text())
    del tree["arch"]["args"]["backbone_bn_momentum"]
    config.write_text(json.dumps(tree))


@pytest.mark.slow
def test_a_step_of_an_older_version_is_the_same(toy_config, capsys):
    parsed = train(toy_config, "--epochs", "1")
    without(parsed.step_dir() / "checkpoint-epoch1.pth")
    (parsed.step_dir() / "last.pth").unlink()
    capsys.readouterr()
    argv = ["-c", str(toy_config), "--epochs", "1", "-r", "auto"]
    again = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
    assert plan_run(step_configs(again)) is None
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"{KEY} is 0.1 here and 0.01 there"):
        train(toy_config, "--epochs", "1", "-r", "auto", "--set", f"{KEY}=0.1")
    train(toy_config, "-r", str(parsed.step_dir() / "checkpoint-epoch1.pth"), mode="eval")


@pytest.mark.slow
def test_a_step_that_is_too_short_for_it(toy_config):
    """Two epochs of five iterations: (1 - m)^10 of the first statistics are left."""

    def warnings(*flags: str) -> list[str]:
        parsed = train(toy_config, "--name", f"n{len(seen)}", *flags)
        seen.append(parsed)
        log = (parsed.log_dir() / "info.log").read_text().splitlines()
        return [line for line in log if "backbone_bn_momentum is" in line]

    seen: list[ConfigParser] = []
    (warning,) = warnings()
    assert "WARNING" in warning
    assert f"{KEY} is 0.01, too little for the 10 iterations of this step: 90 % of" in warning
    assert "from 0.26 on it is less than 5 %" in warning
    assert warnings("--set", f"{KEY}=0.26") == []
    assert warnings("--freeze_bn") == []
    (warning,) = warnings("--bs", "4", "--accumulate", "2", "--set", f"{KEY}=0.1")
    assert "the 20 iterations of this step: 12 % of" in warning


def test_reports_do_not_tell_runs_apart_by_a_key_that_one_of_them_is_too_old_for():
    class Step:
        step, global_batch, file = 0, 8, Path("metrics.json")

        def __init__(self, **args: Any):
            self.config = {"seed": 1} | {f"arch.args.{name}": value for name, value in args.items()}

    class Run:
        def __init__(self, last: Step):
            self.last, self.results = last, {0: last}

    settings = [settings_of(Run(Step(**args))) for args in ({}, {"backbone_bn_momentum": 0.01})]
    assert settings[0] == settings[1]
    assert settings_of(Run(Step(backbone_bn_momentum=0.1))) != settings[0]
