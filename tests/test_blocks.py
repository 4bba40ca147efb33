"""Blocks of a config file by step and task: what holds, what is refused, what is warned of.

And what a step that diverges tells.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from scripts import compare_methods
from scripts.check_data import main as check_data
from scripts.predicting import student
from tests.helpers import PROJECT, train, write_config
from trainer.checks import check_names
from utils import recipe
from utils.errors import UserError
from utils.parse_config import ConfigParser

STEPS = [list(range(1, 16)), [16, 17], [18, 19, 20]]
TASK = "data_loader.args.task"


def nested(dotted: str, value: object) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def lr(value: object) -> dict[str, Any]:
    return nested("optimizer.args.lr", value)


def parse(tree: object, folder: Path, *argv: object) -> ConfigParser:
    path = folder / "own.json"
    path.write_text(json.dumps(tree))
    words = ["-c", str(path), *map(str, argv)]
    return ConfigParser.from_args("train", "configs/config_voc.json", argv=words)


def rates(config: ConfigParser, count: int = 3) -> list[float]:
    return [config.at_step(step)["optimizer"]["args"]["lr"] for step in range(count)]


# ------------------------------------------------------------------------------------- what holds
@pytest.mark.parametrize(
    ("tree", "argv", "expected"),
    [
        ({}, (), [1e-3, 1e-4, 1e-4]),
        (lr(1), (), [1, 1, 1]),
        (lr(1) | {"every_step": lr(2)}, (), [2, 2, 2]),
        ({"every_step": lr(2), "step_0": lr(3)}, (), [3, 2, 2]),
        (lr(1) | {"later_steps": lr(4)}, (), [1, 4, 4]),
        ({"step_0": lr(3)}, (), [3, 1e-4, 1e-4]),
        ({"step_0": lr(3), "tasks": {"15-1": {"every_step": lr(5)}}}, (), [5, 5, 5]),
        ({"tasks": {"15-1": {"every_step": lr(5), "later_steps": lr(6)}}}, (), [5, 6, 6]),
        ({"tasks": {"15-5": {"every_step": lr(5)}}}, (), [1e-3, 1e-4, 1e-4]),
        ({"later_steps": lr(4)}, ("--lr", 7), [7, 7, 7]),
        ({"later_steps": lr(4)}, ("--joint",), [1e-3, 1e-3, 1e-3]),
    ],
)
def test_later_blocks_win(tree, argv, expected, tmp_path):
    config = parse(tree, tmp_path, "--task_name", "15-1", "--task_step", "all", *argv)
    assert rates(config) == expected
    alone = [parse(tree, tmp_path, "--task_step", step, *argv) for step in range(3)]
    assert [each["optimizer"]["args"]["lr"] for each in alone] == expected
    assert not {"every_step", "step_0", "later_steps", "tasks"} & alone[0].as_dict().keys()


def test_a_shipped_config_may_hold_blocks_below_the_recipe(tmp_path):
    tree = json.loads((PROJECT / "configs/config_voc.json").read_text())
    later = nested("trainer.epochs", 5) | nested("data_loader.args.num_workers", 7)
    shipped = tmp_path / "config_voc.json"
    shipped.write_text(json.dumps(tree | {"later_steps": later}))
    config = ConfigParser.from_args("train", str(shipped), argv=["--task_step", "all"])
    found = [config.at_step(step) for step in (0, 1)]
    assert [each["data_loader"]["args"]["num_workers"] for each in found] == [4, 7]
    assert [each["trainer"]["epochs"] for each in found] == [60, 60], "the recipe's"


def test_arguments_and_settings_go_with_what_they_belong_to(tmp_path):
    """Of another schedule, and of another method, which a block may name."""
    warm = {"type": "WarmupPolyLR", "args": {"warmup_iters": 0.5}}
    tree = {"lr_scheduler": warm, "later_steps": {"lr_scheduler": {"type": "PolyLR"}}}
    config = parse(tree, tmp_path, "--task_step", "all")
    assert config.at_step(0).as_dict()["lr_scheduler"] == warm
    assert config.at_step(1).as_dict()["lr_scheduler"] == {"type": "PolyLR", "args": {}}

    tree = {
        "step_0": {"method": "ft"},
        "later_steps": {"method": "mib", "hyperparameter": {"kd": 3}},
    }
    config = parse(tree, tmp_path, "--task_step", "all")
    assert [config.at_step(step)["method"] for step in (0, 1)] == ["ft", "mib"]
    assert config.at_step(0).recipe.file.endswith("ft_voc.json")
    assert config.at_step(1)["hyperparameter"]["kd"] == 3
    other = parse(tree, tmp_path, "--task_step", "1", "--method", "dkd")
    assert other["hyperparameter"]["kd"] == 5, "3 is of mib"


def test_the_batch_of_a_block_takes_the_place_of_the_recipes(tmp_path):
    tree = {"step_0": nested("data_loader.args.train.batch_size", 6)}
    config = parse(tree, tmp_path, "--task_step", "all")
    assert [config.at_step(step).global_batch for step in (0, 1)] == [None, 32]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_over_weights_the_step_beside_them_chooses_the_block(mode, tmp_path):
    weights = tmp_path / "w/last.pth"
    weights.parent.mkdir()
    weights.touch()
    crop = "data_loader.args.test.args.transform_args.crop_size"
    written = nested(f"{TASK}.step", 1)
    # blocks are for files of -c: what lies beside weights holds for their one step
    beside = written | {"later_steps": nested(crop, 3)}
    (weights.parent / "config.json").write_text(json.dumps(beside))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"step_0": nested(crop, 64), "later_steps": nested(crop, 96)}))

    def crop_of(*argv: str) -> int:
        config = ConfigParser.from_args(
            mode, "configs/config_voc.json", argv=["-r", str(weights), *argv]
        )
        return config["data_loader"]["args"]["test"]["args"]["transform_args"]["crop_size"]

    assert crop_of() == 512
    assert crop_of("-c", str(own)) == 96
    assert crop_of("-c", str(own), "--task_step", "0") == 64


# ------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"later_step": lr(1)}, ["unknown key 'later_step' (did you mean 'later_steps'?)"]),
        ({"later_steps": lr(-1)}, [", later_steps: optimizer.args.lr is -1, but must be a number"]),
        ({"later_steps": {"trainr": {}}}, [", later_steps: unknown key 'trainr' (did you mean"]),
        ({"every_step": {"step_0": {}}}, [", every_step: unknown key 'step_0'; valid here: amp"]),
        ({"step_0": 3}, [": step_0 must be a block {…}"]),
        ({"step_0": {"trainer": 3}}, [", step_0: trainer must be a block {…}"]),
        ({"tasks": []}, [": tasks must be a block {…}"]),
        ({"tasks": {"15-1": 3}}, [": tasks.15-1 must be a block {…}"]),
        ({"tasks": {"15-1": {"step_0": 3}}}, [": tasks.15-1.step_0 must be a block {…}"]),
        (
            {"tasks": {"15-1": {"step0": {}}}},
            ["unknown key 'step0' in tasks.15-1 (did you mean 'step_0'?); valid here: every_step"],
        ),
        (
            {"tasks": {"19-1": {"later_steps": lr("x")}}},
            [', tasks.19-1.later_steps: optimizer.args.lr is "x", but must be a number > 0'],
        ),
        ({"step_0": nested(f"{TASK}.step", 1)}, [f", step_0: {TASK}.step is the same for all"]),
        ({"every_step": nested(f"{TASK}.joint", True)}, [f", every_step: {TASK}.joint is the"]),
        ({"later_steps": {"name": "x"}}, [", later_steps: name is the same for all steps"]),
        ({"step_0": {"n_gpu": 2}}, [", step_0: n_gpu is the same for all steps of a run; put it"]),
    ],
)
def test_faulty_blocks(tree, says, tmp_path):
    """In whichever block, also one of another step than this."""
    with pytest.raises(UserError) as caught:
        parse(tree, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "own.json"))
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "mine_voc.json: global_batch must be there, a whole number >= 1"),
        ({"global_batch": True}, "mine_voc.json: global_batch must be there"),
        ({"global_batch": 8, "synchronised_bn": 1}, "synchronised_bn must be true or false"),
        ({"global_batch": 8, "trainer": {}}, "unknown key 'trainer'; valid: every_step"),
        ({"global_batch": 8, "step_0": 1}, "mine_voc.json: step_0 must be a block"),
        (
            {"global_batch": 8, "later_steps": lr(0)},
            "mine_voc.json, later_steps: optimizer.args.lr",
        ),
    ],
)
def test_a_faulty_recipe(tree, says, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    (tmp_path / "mine_voc.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        recipe.read("mine", "voc", "15-1", 0)
    assert says in str(caught.value)


def test_a_schedule_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match=r"own\.json: a name in the block tasks is '15-6', .*15-5"):
        check_names(parse({"tasks": {"15-6": {"every_step": lr(1)}}}, tmp_path))
    mine = nested(f"{TASK}.steps", [[1], [2]])
    for tree in ({"tasks": {"1-1": {"every_step": mine}}}, mine | {"tasks": {"1-1": {}}}):
        check_names(parse(tree, tmp_path, "--task_name", "1-1"))
    config = parse({"tasks": {"1-1": {"every_step": mine}}}, tmp_path, "--task_name", "1-1")
    assert config["data_loader"]["args"]["task"]["steps"] == ((1,), (2,))


# ------------------------------------------------------------------------------ what is warned of
@pytest.mark.parametrize(
    ("tree", "argv", "keys"),
    [
        (lr(0.01), ("--task_step", "all"), ["optimizer.args.lr"]),
        (lr(0.01), ("--task_step", "0"), ["optimizer.args.lr"]),
        (lr(0.001), ("--task_step", "1"), ["optimizer.args.lr"]),
        (lr(0.001), ("--task_step", "0"), []),  # the recipe's own at this step
        ({"every_step": lr(0.01)}, ("--task_step", "all"), ["optimizer.args.lr"]),
        (
            nested("arch.args.freeze_all_bn", False) | lr(0.02),
            ("--task_step", "1-2"),
            ["optimizer.args.lr", "arch.args.freeze_all_bn"],
        ),
        ({"tasks": {"15-1": {"every_step": lr(1)}}}, ("--task_step", "all"), ["optimizer.args.lr"]),
        ({"hyperparameter": {"kd": 3}}, ("--task_step", "all"), []),  # of later steps alone
        ({"step_0": lr(0.01)}, ("--task_step", "all"), []),
        (lr(0.01) | {"later_steps": lr(0.002)}, ("--task_step", "all"), []),
        ({}, ("--task_step", "all", "--lr", "0.01"), ["optimizer.args.lr"]),
        ({}, ("--task_step", "0-1", "--set", "optimizer.args.lr=1"), ["optimizer.args.lr"]),
        ({}, ("--task_step", "1-2", "--lr", "0.01"), []),
        ({}, ("--task_step", "1", "--lr", "0.01"), []),
        (lr(0.01), ("--task_step", "1-2", "--lr", "0.02"), []),  # typed for these alone
        (lr(0.01), ("--task_step", "all", "--joint"), []),
        # settings of a method that is not this one
        ({"method": "finetune", "hyperparameter": {"pos_weight": 9}}, ("--method", "dkd"), []),
    ],
)
def test_one_value_where_the_recipe_has_two(tree, argv, keys, tmp_path):
    config = parse(tree, tmp_path, *argv)
    first = int(argv[1][0]) if argv[1][0].isdigit() else 0
    each_step = [config, *([config.at_step(first)] if config.call.steps else [])]
    for each in each_step:
        assert [re.findall(r"gives (\S+) to all", text)[0] for text in each.warnings] == keys


def test_the_warning_names_file_values_and_remedy(tmp_path):
    (warning,) = parse(lr(0.01), tmp_path, "--task_step", "all").warnings
    assert warning == (
        f"{tmp_path / 'own.json'} gives optimizer.args.lr to all steps: 0.01; "
        "configs/recipes/dkd_voc.json has 0.001 at step 0 and 0.0001 at later steps: put it into "
        "the blocks step_0 and later_steps of the file"
    )
    (warning,) = parse({}, tmp_path, "--task_step", "all", "--lr", "0.01").warnings
    assert "the command line gives optimizer.args.lr to all steps: 0.01; " in warning
    assert "one after the other, each with its own" in warning


# ------------------------------------------------------------------------------------ whole tasks
@pytest.fixture
def own_task(toy_root, tmp_path):
    """A config of three short steps on the toy data, without a learning rate for all of them."""
    path = write_config(tmp_path / "c.json", toy_root, name="own", steps=STEPS)
    tree = json.loads(path.read_text())
    del tree["optimizer"]

    def write(**blocks: Any) -> Path:
        path.write_text(json.dumps(tree | blocks))
        return path

    return write


def test_each_step_is_trained_with_its_block_and_its_log_warns(own_task, tmp_path):
    path = own_task(
        every_step=nested("trainer.clip_grad_norm", 5),
        step_0=nested("trainer.epochs", 1),
        later_steps=lr(0.002),
        hyperparameter={"pos_weight": 3},
    )
    parsed = train(path, "--task_step", "0-1")
    written = [json.loads((parsed.step_dir(n) / "config.json").read_text()) for n in (0, 1)]
    assert [each["optimizer"]["args"]["lr"] for each in written] == [0.001, 0.002]
    assert [each["trainer"]["epochs"] for each in written] == [1, 2]
    assert [each["trainer"]["clip_grad_norm"] for each in written] == [5, 5]
    for n, each in enumerate(written):
        assert not {"every_step", "step_0", "later_steps", "tasks"} & each.keys()
        log = (parsed.log_dir(n) / "info.log").read_text()
        assert log.count("WARNING " + str(path) + " gives hyperparameter.pos_weight to all") == 1
    (weights,) = parsed.step_dir(1).glob("checkpoint-epoch2.pth")
    train(path, "-r", str(weights), mode="eval")


@pytest.mark.slow
def test_a_diverged_step_names_the_way_on(own_task, capsys):
    # two iterations in an epoch: the second is not finite
    path = own_task(later_steps=lr(1e30) | nested("data_loader.args.train.batch_size", 4))
    with pytest.raises(UserError, match="is not finite at step 1, epoch 1") as caught:
        train(path, "--task_step", "all")
    message = str(caught.value)
    assert message.endswith("; to go on from step 1, call again with --task_step 1-2 --lr 1e+29.")
    with pytest.raises(
        UserError, match="holds a finished step of another run: optimizer"
    ) as caught:
        train(path, "--task_step", "all", "--lr", "0.0001")
    assert str(caught.value).endswith(
        "or another --name for a new run, or leave it as it is and go on with --task_step 1-2."
    )
    parsed = train(path, "--task_step", "1-2", "--lr", "0.0001")
    assert (parsed.log_dir(2) / "metrics.json").is_file()
    with pytest.raises(UserError, match=r"or another --name for a new run\.$"):
        train(path, "--task_step", "all", "--lr", "0.01")


@pytest.mark.slow
def test_a_step_that_diverges_later_is_to_be_deleted(own_task, monkeypatch):
    """Its checkpoint was trained with the rate that failed."""
    from trainer.trainer import Trainer

    path = own_task(step_0=nested("trainer.epochs", 3))
    each = Trainer.train_step

    def fail_in_the_second_epoch(self, *args, **kwargs):
        update = each(self, *args, **kwargs)
        return update._replace(loss=update.loss * float("nan")) if self.epoch else update

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail_in_the_second_epoch)
        with pytest.raises(UserError, match="step 0, epoch 2") as caught:
            train(path, "--task_step", "0-1")
    folder = path.parent / "runs/models/overlap_own_toy/step_0"
    assert str(caught.value).endswith(
        "call again with --task_step 0-0 --lr 0.0001, then --task_step 1-1, after deleting "
        f"{folder}, which holds the epochs before."
    )
    with pytest.raises(UserError, match=f"give the same, delete {folder} to train this step anew"):
        train(path, "--task_step", "0-0", "--lr", "0.0001")


# ------------------------------------------------------------------------- others that read configs
def test_the_demo_has_a_rate_for_each_kind_of_step():
    demo = str(PROJECT / "configs/demo.json")
    argv = ["-c", demo, "--task_step", "all"]
    config = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
    assert rates(config, 2) == [0.01, 0.002]
    steps = [config.at_step(step) for step in (0, 1)]
    assert [each["trainer"]["epochs"] for each in steps] == [10, 20]
    assert [each["hyperparameter"]["pos_weight"] for each in steps] == [2, 2]
    assert config.warnings == ()
    script = (PROJECT / "scripts/demo.sh").read_text()
    assert not re.findall(r"--(?:lr|epochs|ep|freeze_bn|pos_weight|set)\b", script)


def test_the_doctor_judges_each_step_by_its_batch(own_task, capsys):
    path = own_task(later_steps=nested("data_loader.args.train.batch_size", 47))
    assert check_data(["voc", "--config", str(path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(
        r"8 images per iteration and process:\n  step 0: .*\n"
        r"task own, overlap, 47 images per iteration and process:\n  step 1: .*\n  step 2: ",
        shown,
    )
    assert re.search(r"step 1: \d+ of 47 images", shown)


def test_a_comparison_takes_no_rate_out_of_a_block(own_task, tmp_path):
    blocks = lr(9) | {"hyperparameter": {"kd": 9}} | nested("trainer.epochs", 3)
    config = own_task(step_0=blocks, tasks={"15-5": {"later_steps": blocks}})
    args = Namespace(config=config, data_dir=tmp_path, out=tmp_path, seed=1)
    tree = json.loads(compare_methods.make_config(args, STEPS).read_text())
    kept = nested("trainer.epochs", 3)
    assert tree["step_0"] == tree["tasks"]["15-5"]["later_steps"] == kept
    config.write_text(json.dumps({"step_0": 3}))
    with pytest.raises(UserError, match="step_0 must be a block"):
        compare_methods.make_config(args, STEPS)


def test_weights_find_a_shipped_config_with_blocks(tmp_path, monkeypatch):
    tree = json.loads((PROJECT / "configs/config_voc.json").read_text())
    (tmp_path / "configs").mkdir()
    shipped = tree | {"step_0": lr(1)}
    (tmp_path / "configs/config_voc.json").write_text(json.dumps(shipped))
    (tmp_path / "config.json").write_text(json.dumps(tree))
    monkeypatch.setattr(student, "PROJECT_ROOT", tmp_path)
    assert student.shipped_config(tmp_path / "w.pth") == "configs/config_voc.json"
