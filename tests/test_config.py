"""Command line and JSON file → `ConfigParser`: precedence, strictness, read-only, no torch."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import PROJECT
from utils.config_schema import FLAGS, OPTIONAL, SCHEMA
from utils.errors import UserError
from utils.parse_config import ConfigParser

PUBLISHED = Path(__file__).parent / "data"
EPOCHS, LR, FREEZE = "trainer.epochs", "optimizer.args.lr", "arch.args.freeze_all_bn"

# The published command line: flag, what is typed, the key it overrides, the value it gives.
VALUE_FLAGS = [
    ("--dist_url", "tcp://node7:2345", "dist_url", "tcp://node7:2345"),
    ("--name", "mine", "name", "mine"),
    ("--save_dir", "elsewhere", "trainer.save_dir", "elsewhere"),
    ("--mem_size", "100", "data_loader.args.memory.mem_size", 100),
    ("--seed", "7", "seed", 7),
    ("--ep", "3", EPOCHS, 3),
    ("--epochs", "3", EPOCHS, 3),
    ("--lr", "0.5", LR, 0.5),
    ("--learning_rate", "5e-1", LR, 0.5),
    ("--bs", "6", "data_loader.args.train.batch_size", 6),
    ("--batch_size", "6", "data_loader.args.train.batch_size", 6),
    ("--task_name", "19-1", "data_loader.args.task.name", "19-1"),
    ("--task_step", "1", "data_loader.args.task.step", 1),
    ("--task_setting", "disjoint", "data_loader.args.task.setting", "disjoint"),
    ("--pos_weight", "2", "hyperparameter.pos_weight", 2.0),
    ("--mbce", "0.5", "hyperparameter.mbce", 0.5),
    ("--kd", "0", "hyperparameter.kd", 0.0),
    ("--dkd_pos", "2.5", "hyperparameter.dkd_pos", 2.5),
    ("--dkd_neg", "1.5", "hyperparameter.dkd_neg", 1.5),
    ("--ac", "0.25", "hyperparameter.ac", 0.25),
]
SWITCHES = [
    ("--follow_links", "data_loader.args.follow_links"),
    ("--multiprocessing_distributed", "multiprocessing_distributed"),
    ("--freeze_bn", FREEZE),
    ("--joint", "data_loader.args.task.joint"),
]
ADDED_FLAGS = [  # not published, of this framework
    ("--data_dir", "somewhere", "data_loader.args.data_dir", "somewhere"),
    ("--saliency_dir", "maps", "data_loader.args.saliency_dir", "maps"),
    ("--method", "finetune", "method", "finetune"),
    ("--accumulate", "4", "trainer.accumulate", 4),
    ("--set", f"{EPOCHS}=3", EPOCHS, 3),
    ("--set", "hyperparameter.kd=2.5", "hyperparameter.kd", 2.5),
    ("--set", "data_loader.args.task.name=19-1", "data_loader.args.task.name", "19-1"),
]
GENERAL = {"-c", "--config", "-r", "--resume", "-d", "--device", "--test", "-h", "--help"}
EVAL_FLAGS = {
    *("--multiprocessing_distributed", "--dist_url", "--name", "--save_dir", "--data_dir"),
    *("--follow_links", "--set", "--task_name", "--task_step"),
}


def parse(*argv: object, mode: str = "train", dataset: str = "voc") -> ConfigParser:
    words = [str(word) for word in argv]
    return ConfigParser.from_args(mode, f"configs/config_{dataset}.json", argv=words)


def parse_json(tree: object, folder: Path, *argv: object, dataset: str = "voc") -> ConfigParser:
    """With `-c` and a file that holds `tree`, or the text `tree`."""
    path = folder / "own.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return parse("-c", path, *argv, dataset=dataset)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; an empty block is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        block = isinstance(value, Mapping) and len(value) > 0
        flat |= leaves(value, f"{prefix}{key}.") if block else {f"{prefix}{key}": value}
    return flat


def shipped(*argv: object, dataset: str = "voc") -> ConfigParser:
    """What the shipped file says, named with -c, so without the method's recipe."""
    return parse("-c", PROJECT / f"configs/config_{dataset}.json", *argv, dataset=dataset)


def effective(config: ConfigParser) -> dict[str, Any]:
    return leaves(config.as_dict())


def nested(dotted: str, value: object) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


# -------------------------------------------------------------------------------- shipped files
@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_shipped_config_holds_every_published_value(dataset):
    published = leaves(json.loads((PUBLISHED / f"published_config_{dataset}.json").read_text()))
    assert published.pop("test") is False  # of released files, without effect
    ours = effective(shipped(dataset=dataset))
    assert len(published) > 40
    assert {key: ours.get(key, "missing") for key in published} == published
    assert {key: type(ours[key]) for key in published} == {
        key: type(value) for key, value in published.items()
    }


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_shipped_config_holds_every_key_and_no_other(dataset):
    shipped = json.loads((PROJECT / f"configs/config_{dataset}.json").read_text())
    keys = {key for key in leaves(shipped) if not key.startswith("hyperparameter.")}
    assert keys - OPTIONAL - {"lr_scheduler.args", "evaluator.args"} == set(SCHEMA) - OPTIONAL


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_released_config_is_accepted_wherever_a_config_is(dataset, tmp_path):
    released = PUBLISHED / f"published_config_{dataset}.json"
    tree = json.loads(released.read_text())
    weights = beside(tmp_path, tree)
    for config in (parse("-c", released, dataset=dataset), parse("-r", weights, dataset=dataset)):
        assert effective(config) == effective(shipped(dataset=dataset))
        assert not config.call.test
        assert not any("ignored" in note for note in config.notes)
    assert not parse_json(tree | {"test": True}, tmp_path, dataset=dataset).call.test
    with pytest.raises(UserError, match=r"test is 3, but must be true or false"):
        parse_json(tree | {"test": 3}, tmp_path, dataset=dataset)


# --------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(("flag", "text", "key", "value"), VALUE_FLAGS + ADDED_FLAGS)
def test_flag_overrides_its_key_and_nothing_else(flag, text, key, value):
    before, after = effective(shipped()), effective(shipped(flag, text))
    assert after[key] == value != before[key]
    assert type(after[key]) is type(value)
    changed = {name for name in before if before[name] != after.get(name)}
    if key == "method":  # the file's settings are those of its own method
        changed -= {name for name in before if name.startswith("hyperparameter.")}
    assert changed == {key}


@pytest.mark.parametrize(("flag", "key"), SWITCHES)
def test_switch_overrides_its_key_in_both_directions(flag, key, tmp_path):
    off = flag.replace("--", "--no-")
    for in_file in (True, False):
        tree = nested(key, in_file)
        assert effective(parse_json(tree, tmp_path))[key] is in_file, "absent: the file decides"
        assert effective(parse_json(tree, tmp_path, flag))[key] is True
        assert effective(parse_json(tree, tmp_path, off))[key] is False


def test_flags_that_are_no_key(tmp_path):
    weights = tmp_path / "w.pth"
    weights.touch()
    (tmp_path / "config.json").write_text("{}")
    assert (parse().call.resume, parse().call.device, parse().call.test) == (None, None, False)
    for short in (True, False):
        resume, device = ("-r", "-d") if short else ("--resume", "--device")
        config = parse(resume, weights, device, "0,1", "--test")
        assert (config.call.resume, config.call.device, config.call.test) == (weights, "0,1", True)
    assert parse("-r", weights, mode="eval").call.test
    assert parse("-r", weights, "--test", mode="eval").call.test
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json beside .*; name .* with -c"):
        parse("-r", weights, mode="eval")
    assert effective(parse("--config", PROJECT / "configs/demo.json"))[EPOCHS] == 10


def test_tables_above_name_every_flag():
    listed = {row[0] for row in (*VALUE_FLAGS, *SWITCHES, *ADDED_FLAGS)}
    assert listed == {name for flag in FLAGS for name in flag.names} | {"--set"}
    assert {name for flag in FLAGS if flag.eval_too for name in flag.names} | {
        "--set"
    } == EVAL_FLAGS


def test_abbreviated_flag_is_refused():
    with pytest.raises(UserError, match=r"unrecognized arguments: --epoch 3"):
        parse("--epoch", "3")


@pytest.mark.parametrize("script", ["train_voc", "train_ade", "eval_voc", "eval_ade"])
def test_help_names_every_flag_and_needs_no_torch(script):
    done = run_traced(script, "--help")
    assert done.returncode == 0, done.stderr
    named = set(re.findall(r"(?<![\w-])--?[a-z]\w*", done.stdout))
    expected = {row[0] for row in (*VALUE_FLAGS, *SWITCHES, *ADDED_FLAGS)}
    if script.startswith("eval"):
        assert not named & (expected - EVAL_FLAGS)
        expected = EVAL_FLAGS
    else:
        expected = expected | {"--base"}
    assert expected | GENERAL <= named
    imported = set(imports(done.stderr))
    assert "utils.parse_config" in imported
    assert "torch" not in imported


def test_wrong_flag_is_answered_without_torch():
    done = run_traced("train_voc", "--ep", "0")
    assert done.returncode == 2
    assert "trainer.epochs is 0" in done.stderr
    assert "torch" not in set(imports(done.stderr))


def run_traced(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", f"{script}.py", *argv]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def imports(trace: str) -> Iterator[str]:
    return (line.rsplit("|", 1)[1].strip() for line in trace.splitlines() if "| " in line)


# ----------------------------------------------------------------------------------- precedence
@pytest.mark.parametrize(
    ("key", "default", "in_file", "flag", "typed"),
    [
        (EPOCHS, 60, 5, "--ep=3", 3),
        (LR, 0.001, 0.25, "--lr=0.5", 0.5),
        ("name", "DKD", "file", "--name=typed", "typed"),
        ("hyperparameter.kd", 5, 2, "--kd=0", 0),
        ("data_loader.args.task.step", 0, 2, "--task_step=0", 0),
        (FREEZE, False, True, "--no-freeze_bn", False),
    ],
)
def test_typed_flag_beats_file_beats_default(key, default, in_file, flag, typed, tmp_path):
    tree = nested(key, in_file)
    assert effective(parse())[key] == default
    assert effective(parse_json(tree, tmp_path))[key] == in_file
    assert effective(parse_json(tree, tmp_path, flag))[key] == typed


def test_partial_file_leaves_all_else_at_the_default(tmp_path):
    tree = {"hyperparameter": {"kd": 2}, "arch": {"args": {"output_stride": 8}}}
    changed = {"hyperparameter.kd": 2, "arch.args.output_stride": 8}
    assert effective(parse_json(tree, tmp_path)) == effective(parse()) | changed
    assert effective(parse_json({}, tmp_path)) == effective(parse())


def test_arguments_of_the_default_scheduler_go_when_the_file_names_another(tmp_path):
    def scheduler(tree: dict[str, Any], dataset: str) -> dict[str, Any]:
        return parse_json(tree, tmp_path, dataset=dataset).as_dict()["lr_scheduler"]

    warmup = {"type": "WarmupPolyLR", "args": {"warmup_iters": 0.2}}
    assert scheduler({}, "ade") == warmup
    assert scheduler({"lr_scheduler": {"type": "WarmupPolyLR"}}, "ade") == warmup
    assert scheduler({"lr_scheduler": {"type": "PolyLR"}}, "ade") == {"type": "PolyLR", "args": {}}
    own = {"type": "PolyLR", "args": {"power": 0.5}}
    assert scheduler({"lr_scheduler": own}, "ade") == own
    kept = {"warmup_iters": 0.2, "power": 0.5}
    assert scheduler({"lr_scheduler": {"args": {"power": 0.5}}}, "ade")["args"] == kept
    assert scheduler({"lr_scheduler": warmup}, "voc") == warmup


def test_arguments_of_the_default_optimizer_go_when_the_file_names_another(tmp_path):
    def optimizer(tree: dict[str, Any]) -> dict[str, Any]:
        return parse_json({"optimizer": tree}, tmp_path).as_dict()["optimizer"]

    both = {"lr": 0.001, "weight_decay": 0.0001}
    assert optimizer({"type": "AdamW"}) == {"type": "AdamW", "args": both}
    own = {"lr": 6e-5, "betas": [0.9, 0.99], "eps": 1e-6}
    assert optimizer({"type": "AdamW", "args": own})["args"] == both | own
    sgd = {"momentum": 0.9, "nesterov": True}
    assert optimizer({"args": {"lr": 1}})["args"] == both | sgd | {"lr": 1}


@pytest.mark.parametrize(("dataset", "other"), [("voc", "ADE"), ("ade", "VOC")])
def test_config_of_another_data_set_is_refused(dataset, other):
    file = PROJECT / f"configs/config_{other.lower()}.json"
    with pytest.raises(UserError, match=rf"data_loader\.type is '{other}.*call that data set"):
        parse("-c", file, dataset=dataset)


# ------------------------------------------------------------------- config.json beside a weight
def beside(folder: Path, tree: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    weights = folder / "last.pth"
    weights.touch()
    return weights


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_unknown_key_beside_a_weight_is_ignored_with_a_note(mode, tmp_path):
    tree = {"seed": 4, "wandb": {"on": True}, "trainer": {"save_best": 1, "epochs": 7}}
    config = parse("-r", beside(tmp_path, tree), mode=mode)
    assert effective(config) == effective(shipped()) | {"seed": 4, EPOCHS: 7}, "the rest: defaults"
    assert any(str(tmp_path / "config.json") in note for note in config.notes)
    assert any("ignored" in n and "wandb, trainer.save_best" in n for n in config.notes)
    with pytest.raises(UserError, match="unknown key 'wandb'"):
        parse("-c", tmp_path / "config.json")


def test_wrong_value_beside_a_weight_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError) as caught:
        parse("-r", beside(tmp_path, {"seed": "x"}), mode="eval")
    assert f"{tmp_path / 'config.json'}: seed is" in str(caught.value)


def test_named_config_overrides_single_keys_of_the_one_beside_the_weight(tmp_path):
    tree = {"seed": 4, "hyperparameter": {"kd": 3, "of_another_version": 1}}
    weights = beside(tmp_path, tree | {"trainer": {"epochs": 7, "save_dir": "evil"}})
    mine = {"seed": 5, "hyperparameter": {"kd": 2, "misspelt": 1}}
    config = parse_json(mine, tmp_path, "-r", weights, "--kd", "1")
    rest = {"hyperparameter.of_another_version": 1, "hyperparameter.misspelt": 1}
    assert effective(config) == effective(shipped()) | rest | {
        "seed": 5,
        EPOCHS: 7,
        "hyperparameter.kd": 1,
    }
    # Only what the other version wrote may be unknown.
    assert "hyperparameter.of_another_version" in config.beside
    assert not {"hyperparameter.misspelt", "hyperparameter.kd", "seed"} & config.beside
    assert config.notes[0] == f"config: {tmp_path / 'own.json'}"
    assert config.notes[1].endswith("config.json, which lies beside the weights")
    folder = nested("data_loader.args.task.idxs_path", "lists")
    assert parse("-r", beside(tmp_path, folder)).cache_dir == parse().cache_dir != "lists"
    assert parse_json(folder, tmp_path, "-r", weights).cache_dir == "lists"


def test_named_scheduler_does_not_take_arguments_of_the_one_beside_the_weight(tmp_path):
    warm = {"type": "WarmupPolyLR", "args": {"warmup_iters": 0.5, "power": 0.8}}
    weights = beside(tmp_path, {"lr_scheduler": warm})
    poly = parse_json({"lr_scheduler": {"type": "PolyLR"}}, tmp_path, "-r", weights)
    assert poly.as_dict()["lr_scheduler"] == {"type": "PolyLR", "args": {}}
    kept = parse_json({"lr_scheduler": {"args": {"power": 1}}}, tmp_path, "-r", weights)
    assert kept.as_dict()["lr_scheduler"]["args"] == {"warmup_iters": 0.5, "power": 1}


def test_file_beside_a_weight_does_not_choose_the_save_dir(tmp_path):
    def save_dir(weights: Path, mode: str, *argv: str) -> str:
        return parse("-r", weights, *argv, mode=mode)["trainer"]["save_dir"]

    tree = {"trainer": {"save_dir": str(tmp_path / "evil")}}
    trained = beside(tmp_path / "runs/models/overlap_15-1_DKD/step_0", tree)
    downloaded = beside(tmp_path / "downloads", tree)
    default = parse()["trainer"]["save_dir"]
    assert save_dir(trained, "train") == str(tmp_path / "runs"), "the tree that holds it"
    assert save_dir(trained, "eval") == str(tmp_path / "runs"), "results go beside the run"
    assert save_dir(downloaded, "train") == save_dir(downloaded, "eval") == default
    for mode in ("train", "eval"):
        assert save_dir(trained, mode, "--save_dir", "typed") == "typed"


def test_links_of_own_runs_are_followed_in_evaluation(tmp_path):
    """Of weights below the save_dir that this call names; elsewhere only the flag counts."""

    def follows(weights: Path, *argv: object, mode: str = "eval") -> bool:
        return parse("-r", weights, *argv, mode=mode)["data_loader"]["args"]["follow_links"]

    tree = nested("data_loader.args.follow_links", True)
    own = beside(tmp_path / "runs/models/overlap_15-1_DKD/step_0", tree)
    downloaded = beside(tmp_path / "downloads/models/overlap_15-1_DKD/step_0", tree)
    here = ("--save_dir", tmp_path / "runs")
    assert follows(own, *here)
    assert not follows(own)
    assert not follows(downloaded, *here)
    assert not follows(own, *here, "--no-follow_links")
    assert follows(downloaded, "--follow_links")
    assert follows(own, mode="train")
    without = beside(tmp_path / "runs/models/overlap_15-1_DKD/step_1", {})
    assert not follows(without, *here)


# ------------------------------------------------------------------------------------ read-only
def containers(value: Any) -> Iterator[Any]:
    """Every mapping and sequence of a configuration."""
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from containers(item)
    elif not isinstance(value, (str, int, float, type(None))):
        yield value
        for item in value:
            yield from containers(item)


def assert_read_only(config: ConfigParser) -> None:
    with pytest.raises(TypeError):
        config["name"] = "other"
    found = [part for name in config.as_dict() for part in containers(config[name])]
    assert len(found) > 20
    for part in found:
        key = next(iter(part), "new") if isinstance(part, Mapping) else 0
        with pytest.raises(TypeError):
            part[key] = 1
        with pytest.raises(TypeError):
            del part[key]


def test_config_is_read_only_at_every_depth(tmp_path):
    tree = nested("data_loader.args.task.steps", [[1, 2], [3]])
    config = parse_json(tree, tmp_path)
    assert_read_only(config)
    copy = config.as_dict()
    copy["trainer"]["epochs"] = copy["metrics"][0] = copy["data_loader"]["args"]["task"] = None
    assert config["trainer"]["epochs"] == 60
    assert config["metrics"][0] == "Pixel_Accuracy"
    assert config["data_loader"]["args"]["task"]["steps"] == ((1, 2), (3,))


def test_pickling_keeps_everything(tmp_path):
    weights = beside(tmp_path, {"name": "kept"})
    config = parse("-r", weights, "-d", "0", "--test")
    copy = pickle.loads(pickle.dumps(config))
    assert copy.as_dict() == config.as_dict()
    for name in ("call", "notes", "run_folder"):
        assert getattr(copy, name) == getattr(config, name)
    assert copy.step_dir(2) == Path("saved_voc/models/overlap_15-1_kept/step_2")
    assert_read_only(copy)


# ------------------------------------------------------------------------------------- bad files
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["line 1, column 1", "not valid JSON"]),
        ('{\n  "name": DKD\n}', ["line 2, column 11", "not valid JSON"]),
        ('{\n  "seed": 1\n', ["line 3, column 1", "not valid JSON"]),
        ("[]", ["must hold one JSON object"]),
        ('"seed"', ["must hold one JSON object"]),
        ('{"seed": 1, "seed": 1}', ["key 'seed' stands twice"]),
        ('{"trainer": {"epochs": 1, "verbosity": 1, "epochs": 2}}', ["key 'epochs' stands twice"]),
        ('{"seed": NaN}', ["seed is nan", "a whole number >= 0"]),
        ('{"optimizer": {"args": {"lr": NaN}}}', [f"{LR} is nan", "a number > 0"]),
        ('{"optimizer": {"args": {"lr": Infinity}}}', [f"{LR} is inf", "a number > 0"]),
        ('{"optimizer": {"args": {"lr": 1e999}}}', [f"{LR} is inf", "a number > 0"]),
        ('{"hyperparameter": {"kd": -Infinity}}', ["hyperparameter.kd is -inf", "number >= 0"]),
        pytest.param(f'{{"seed": 1{400 * "0"}}}', ["seed"], id="400 digits"),
        pytest.param(f'{{"seed": 1{5000 * "0"}}}', ["cannot be read"], id="5000 digits"),
        pytest.param('{"trainer.epochs": 3}', ["unknown key"]),
    ],
)
def test_broken_file(text, says, tmp_path):
    assert_refused(text, says, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", True, "is true, but must be a whole number"),
        ("seed", 1.5, "is 1.5, but must be a whole number"),
        ("seed", 2**63, "is 9223372036854775808, but must be a whole number"),
        (EPOCHS, 60.0, "is 60.0, but must be a whole number >= 1"),
        (EPOCHS, None, "is null, but must be a whole number >= 1"),
        (LR, False, "is false, but must be a number > 0"),
        (LR, "0.1", 'is "0.1", but must be a number > 0'),
        (LR, 0, "is 0, but must be a number > 0"),
        ("optimizer.args.betas", 0.9, "is 0.9, but must be a list of two numbers"),
        ("optimizer.args.eps", 0, "is 0, but must be a number > 0"),
        ("optimizer.args.momentum", 1.5, "is 1.5, but must be a number >= 0 and <= 1"),
        ("hyperparameter.kd", {}, "is {}, but must be a number >= 0"),
        ("name", 3, "is 3, but must be a non-empty string"),
        ("name", {}, "is {}, but must be a non-empty string"),
        (FREEZE, "true", 'is "true", but must be true or false'),
        (FREEZE, 1, "is 1, but must be true or false"),
        ("metrics", "Pixel_Accuracy", "must be a list of names"),
        ("data_loader.args.data_dir", 1, "is 1, but must be a non-empty string or null"),
        ("data_loader.args.task.steps", {}, "is {}, but must be a list of lists of ids or null"),
        ("arch.args.output_stride", 4, "is 4, but must be one of 8, 16"),
        ("data_loader.args.val.args.masking_value", False, "is false, but must be one of 0, 255"),
        ("amp_dtype", "float32", 'but must be one of "float16", "bfloat16"'),
        ("fast.channels_last", "auto", 'is "auto", but must be true or false'),
        ("fast", True, "must be a block"),
        ("trainer", [], "must be a block"),
        ("lr_scheduler.args", None, "must be a block"),
        ("hyperparameter", 5, "must be a block"),
    ],
)
def test_wrong_type_or_range(key, value, says, tmp_path):
    assert_refused(nested(key, value), [key, says], tmp_path)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("trainr", ["'trainr'", "did you mean 'trainer'?", "valid here: amp_dtype, arch, data_"]),
        (
            "trainer.epoch",
            ["'trainer.epoch'", "did you mean 'epochs'?", "early_stop, epochs, keep"],
        ),
        (
            "optimizer.args.beta",
            ["'optimizer.args.beta'", "'betas'?", "betas, eps, lr, momentum, nest"],
        ),
        ("evaluator.args.x", ["'evaluator.args.x'", "valid here: nothing"]),
    ],
)
def test_unknown_key_is_told_with_the_valid_ones(key, says, tmp_path):
    assert_refused(nested(key, 1), ["unknown key", *says], tmp_path)


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match=r"config file .*nowhere\.json does not exist"):
        parse("-c", tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=f"config file {re.escape(str(tmp_path))} cannot be read"):
        parse("-c", tmp_path)
    (tmp_path / "latin.json").write_bytes('{"name": "Größe"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json cannot be read: .*utf-8"):
        parse("-c", tmp_path / "latin.json")


def assert_refused(tree: object, says: list[str], folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_json(tree, folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "own.json")), "names the file"
    assert "\n" not in message
    for part in says:
        assert part in message
