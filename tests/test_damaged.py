"""What is read back: damaged weights, checkpoints, configs, memories end in one sentence each."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from base.task import make_task
from data_loader import exemplars
from models.model import DeepLabV3
from models.weights import check_imagenet, load_strict
from scripts.predicting.student import Predictor
from tests import damage
from tests.helpers import dkd_heads, train
from trainer.checks import check_names, with_settings
from trainer.methods.sdr import SDR
from trainer.plan import plan_run
from trainer.precision import Precision
from trainer.run import run
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.checkpoint_form import FORM, not_finite
from utils.config_file import LARGEST_CONFIG, read_config, read_json
from utils.config_schema import SCHEMA
from utils.errors import UserError
from utils.forms import fault
from utils.history import History
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted

SHARE = 0.2  # of the variants, in the default run


def shares():
    """The compact table, and the full one for a slow run."""
    return [pytest.param(SHARE, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def outcomes(variants, read):
    """Variants that were accepted, of all; anything but one short sentence is raised."""
    accepted = []
    for words, value in variants:
        try:
            read(value)
        except UserError as error:
            if len(str(error)) > 1500:
                raise AssertionError(f"{words}: a long sentence") from error
        except Exception as error:
            raise AssertionError(words) from error
        else:
            accepted.append(words)
    return accepted


# ------------------------------------------------------------------------------------------ weights
class Network(nn.Module):
    """Real numbers, buffers, and the whole number that BatchNorm keeps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "w.pth"


def load_into_network(path):
    load_strict(Network(), files.load(path)["state_dict"], f"weight file {path}")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_good_weights_load_to_the_bit(weights, prefix):
    """A file with nothing but a state dict, as released ones are."""
    state = Network().state_dict()
    torch.save({"state_dict": {f"{prefix}{name}": t for name, t in state.items()}}, weights)
    model = Network()
    load_strict(model, files.load(weights)["state_dict"], "weights")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_damaged_weights(weights):
    state = Network().state_dict()
    # Of dicts of tensors the generator takes two; each of these is one.
    tree = {"state_dict": state, "epoch": 2}

    def read(value):
        torch.save(value, weights)
        load_into_network(weights)

    accepted = outcomes(damage.of_checkpoint(tree), read)
    unread = ("epoch is missing", "epoch is called", "has a key more")
    assert [words for words in accepted if not any(part in words for part in unread)] == [
        *(f"epoch is {what}" for what in ("zero", "a million"))
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_of_weights(weights, legacy):
    torch.save(
        {"state_dict": Network().state_dict()},
        weights,
        _use_new_zipfile_serialization=not legacy,
    )

    good = files.load(weights)["state_dict"]

    def read(content):
        weights.write_bytes(content)
        load_into_network(weights)
        found = files.load(weights)["state_dict"]
        # The old form has no checksums, so that an altered value goes unseen.
        assert legacy or all(torch.equal(good[name], found[name]) for name in good)

    outcomes(damage.of_bytes(weights.read_bytes()), read)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (damage.HTML, r"it is a text that begins with '<!DOCTYPE html>'; if a download left it"),
        (damage.POINTER, r"begins with 'version https://git-lfs"),
        (b"", "cannot be read: it is empty"),
        (b"\x80\x02garbage", "it is damaged, or no file of torch.save"),
    ],
)
def test_what_is_no_weight_file(weights, content, says):
    weights.write_bytes(content)
    with pytest.raises(files.Damaged, match=says):
        files.load(weights)


def test_an_archive_that_claims_more_than_it_has(weights):
    import zipfile

    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(10**7))
    with pytest.raises(files.Damaged, match="claim more bytes than the file has"):
        files.load(weights)


def changed(name, change):
    state = Network().state_dict()
    state[name] = change(state[name])
    return state


WRONG_WEIGHTS = {
    "NaN": (
        lambda: changed("conv.weight", lambda t: t.index_fill(0, torch.tensor([1, 2]), math.nan)),
        r"54 values of 1 tensors are not finite: conv.weight \(54\)",
    ),
    "infinite statistics": (
        lambda: changed("norm.running_var", lambda t: t / 0),
        r"4 values of 1 tensors are not finite: norm.running_var \(4\)",
    ),
    "infinite as float32": (
        lambda: changed("conv.bias", lambda t: t.double() * 0 + 1e300),
        r"not finite: conv.bias \(4\)",
    ),
    "whole numbers": (
        lambda: {name: tensor.long() for name, tensor in Network().state_dict().items()},
        r"of another type: conv.bias int64 instead of float32, conv.weight int64 instead of",
    ),
    "a counter with fractions": (
        lambda: changed("norm.num_batches_tracked", lambda t: t + 0.5),
        r"of another type: norm.num_batches_tracked float32 instead of int64",
    ),
    "complex": (lambda: changed("conv.bias", lambda t: t + 0j), r"conv.bias \(of complex64\)"),
    "truth values": (lambda: changed("conv.bias", lambda t: t > 0), r"conv.bias \(of bool\)"),
    "sparse": (
        lambda: changed("conv.bias", torch.Tensor.to_sparse),
        r"conv.bias \(of the layout sparse_coo\)",
    ),
    "meta": (lambda: changed("conv.bias", lambda t: t.to("meta")), r"conv.bias \(without values\)"),
    "one value shown often": (
        lambda: changed("conv.bias", lambda t: t[:1].clone().expand(10**12)),
        r"conv.bias \(one value shown many times\)",
    ),
    "a list": (lambda: changed("conv.bias", lambda t: [0.0]), r"1 of 7 entries .*\(a list of 1\)"),
    "a number as a name": (lambda: Network().state_dict() | {3: torch.ones(1)}, "the name 3"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights(weights, case):
    state, says = WRONG_WEIGHTS[case]
    torch.save({"state_dict": state()}, weights)
    with pytest.raises(UserError, match=says):
        load_into_network(weights)


@pytest.mark.parametrize("top", [[1, 2], torch.ones(3), {"model_state": {}}, "text", None])
def test_files_without_a_state_dict(weights, top):
    torch.save(top, weights)
    with pytest.raises(UserError, match="holds no 'state_dict'"):
        files.load(weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted_and_the_log_says_so(weights, dtype, caplog):
    state = Network().state_dict()
    other = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    torch.save({"state_dict": other}, weights)
    with caplog.at_level("INFO", "dkd"):
        model = Network()
        load_strict(model, files.load(weights)["state_dict"], "the file")
    assert torch.equal(model.conv.weight, other["conv.weight"].float())


def test_imagenet_weights_are_looked_at_as_well(tmp_path):
    from models.backbone import BACKBONES

    file = tmp_path / "tiny.pth"
    state = BACKBONES["tiny"].build(16).state_dict()
    torch.save(state, file)
    check_imagenet("tiny", str(file))
    name = next(iter(state))
    for wrong, says in {
        math.nan: rf"backbone_pretrained: the weight file .*not finite: {name}",
        None: rf"1 of {len(state)} entries are no weights: {name} \(null\)",
    }.items():
        value = None if wrong is None else torch.full_like(state[name], wrong)
        torch.save(state | {name: value}, file)
        with pytest.raises(UserError, match=says):
            check_imagenet("tiny", str(file))
    file.write_bytes(damage.HTML)
    with pytest.raises(UserError, match="begins with '<!DOCTYPE html>'"):
        check_imagenet("tiny", str(file))


def test_what_is_not_finite_is_named_wherever_it_stands():
    tree = {"a": {"b": [torch.ones(2), torch.tensor([1.0, math.inf])]}, "best": math.nan}
    assert not_finite(tree) == "2 values of 2 tensors are not finite: best (1), a.b[1] (1)"
    # What has no values of its own is judged by its form.
    no_values = {"a": torch.ones(2, device="meta"), "b": torch.ones(1).expand(10**12)}
    assert not_finite(no_values) is None
    assert (
        not_finite({"a": torch.zeros(0), "n": torch.ones(3, dtype=torch.int64), "x": 1e9}) is None
    )


# ----------------------------------------------------------------------------- evaluate and predict
@pytest.fixture(scope="module")
def downloaded(tmp_path_factory, toy_root):
    """A folder with weights and the config of a run that wrote its every key."""
    from tests.helpers import write_config

    folder = tmp_path_factory.mktemp("downloaded")
    config = write_config(folder / "toy.json", toy_root)
    parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=["-c", str(config)])
    (folder / "config.json").write_text(json.dumps(parsed.as_dict()))
    model = DeepLabV3(dkd_heads(1, 15), backbone="tiny")
    torch.save({"state_dict": model.state_dict()}, folder / "w.pth")
    return folder


def evaluated(folder: Path) -> ConfigParser:
    argv = ["-r", str(folder / "w.pth"), "--save_dir", str(folder / "runs")]
    return ConfigParser.from_args("eval", "configs/config_voc.json", argv=argv)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_figure_of_weights_that_are_not_finite(downloaded, tmp_path, value):
    shutil.copytree(downloaded, tmp_path, dirs_exist_ok=True)
    checkpoint = torch.load(tmp_path / "w.pth", weights_only=True)
    checkpoint["state_dict"]["cls.1.bias"][:2] = value
    torch.save(checkpoint, tmp_path / "w.pth")
    for read in (
        lambda: plan_run([evaluated(tmp_path)]),
        lambda: Predictor.of(tmp_path / "w.pth", torch.device("cpu")),
    ):
        with pytest.raises(UserError, match=r"2 values of 1 tensors are not finite: cls.1.bias"):
            read()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("family", ["background", "unknown"])
def test_weights_of_another_family(downloaded, tmp_path, family):
    """Their channels have the same shapes and another meaning."""
    shutil.copytree(downloaded, tmp_path, dirs_exist_ok=True)
    checkpoint = torch.load(tmp_path / "w.pth", weights_only=True)
    torch.save({**checkpoint, "family": family, "method": "mib"}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"was trained by 'mib' of the family '{family}', but"):
        plan_run([evaluated(tmp_path)])


# ---------------------------------------------------------------------------- config beside weights
@pytest.mark.parametrize("share", shares())
def test_damaged_config_beside_weights(downloaded, tmp_path, share):
    shutil.copytree(downloaded, tmp_path, dirs_exist_ok=True)
    beside = tmp_path / "config.json"
    text = beside.read_text()

    def read(content):
        beside.write_bytes(content)
        start = time.perf_counter()
        if share == 1:
            plan_run([evaluated(tmp_path)])
        else:  # without the data set
            check_names(with_settings(evaluated(tmp_path)))
        assert time.perf_counter() - start < 20

    outcomes(damage.some(damage.of_json(text), share), read)


COUNTS = [
    *(key for key, rule in SCHEMA.items() if int in rule.types and not rule.choices),
]


def test_every_count_has_a_largest_value():
    without = {key for key in COUNTS if float not in SCHEMA[key].types and not SCHEMA[key].most}
    assert without == {"seed"}
    for key in set(COUNTS) - {"seed"}:
        rule = SCHEMA[key]
        if rule.most and float not in rule.types:
            assert rule.accepts(int(rule.most))
            assert not rule.accepts(int(rule.most) + 1)


def test_a_downloaded_config_starts_no_processes_of_its_choice(downloaded, tmp_path):
    shutil.copytree(downloaded, tmp_path, dirs_exist_ok=True)
    tree = json.loads((tmp_path / "config.json").read_text())
    args = tree["data_loader"]["args"]
    args["num_workers"] = 200
    args["test"]["batch_size"] = 60_000
    (tmp_path / "config.json").write_text(json.dumps(tree))
    parsed = evaluated(tmp_path)["data_loader"]["args"]
    assert (parsed["num_workers"], parsed["test"]["batch_size"]) == (4, 1)
    args["num_workers"] = 5000
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"num_workers is 5000, but must be .* <= 256"):
        evaluated(tmp_path)


def test_own_weights_are_loaded_with_the_workers_of_their_run(toy_config):
    run = train(toy_config, "--epochs", "1", "--bs", "40")
    weights = run.step_dir() / files.epoch_file(1)
    argv = ["-r", str(weights), "--save_dir", run["trainer"]["save_dir"]]
    parsed = ConfigParser.from_args("eval", "configs/config_voc.json", argv=argv)
    args = parsed["data_loader"]["args"]
    assert (args["num_workers"], args["test"]["batch_size"]) == (0, 8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested over 32 deep"),
        (b'{"a": "' + b"x" * (LARGEST_CONFIG + 1) + b'"}', "it has over 1 MiB"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' stands twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_limits_of_config_files(tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_config(tmp_path / "config.json")
    assert len(str(caught.value)) < 400


def test_many_keys_are_read_at_once(tmp_path):
    text = "{" + ", ".join(f'"k{n}": {n}' for n in range(60_000)) + ', "k7": 0}'
    (tmp_path / "config.json").write_text(text)
    start = time.perf_counter()
    with pytest.raises(UserError, match="key 'k7' stands twice"):
        read_config(tmp_path / "config.json")
    assert time.perf_counter() - start < 5


def test_a_device_is_no_endless_file():
    with pytest.raises(UserError, match="over 1 MiB"):
        read_config(Path("/dev/zero"))


@pytest.mark.parametrize("value", ["x" * 5000, ["a"] * 70_000])
def test_long_values_are_refused_in_a_short_sentence(value):
    key = "data_loader.args.data_dir" if isinstance(value, str) else "data_loader.args.class_names"
    assert not SCHEMA[key].accepts(value)


# ------------------------------------------------------------------------------------ replay memory
MEMORY = {
    f"step_{t}": {
        "memory_candidates": [[f"image{t}{n}", [n, 4]] for n in range(1, 4)],
        "memory_list": [f"image{t}{n}" for n in range(1, 4)],
    }
    for t in (2, 1)
}


def read_memory(tmp_path, content):
    path = tmp_path / "memory.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return exemplars.read(path, (1, 2, 3), step=2, known=(0, 1, 2, 3, 4, 255))


@pytest.mark.parametrize("share", shares())
def test_damaged_replay_memories(tmp_path, share):
    read_memory(tmp_path, MEMORY)
    variants = damage.some(damage.of_json(json.dumps(MEMORY)), share)
    accepted = outcomes(variants, lambda content: read_memory(tmp_path, content))
    # What is left is another good file: other ids of an image, a key that nobody reads, a mark.
    good = ("][1]", "has a key more", "a byte-order mark")
    assert all(any(part in words for part in good) for words in accepted), accepted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("step_2"), "has no step_2; put the file of that run there"),
        (lambda m: m.pop("step_1"), "has no step_1"),
        (
            lambda m: m.update(step_2={"memory_candidates": [], "memory_list": []}),
            "step_2 is empty; put the file of that run there, or train that step anew",
        ),
        (lambda m: m["step_2"]["memory_candidates"][0][1].append(9), "the label id 9 in image"),
        (lambda m: m["step_2"]["memory_candidates"][0][1].append(-1), "is -1, but must be"),
        (lambda m: m["step_2"]["memory_candidates"][0][1].clear(), "no label id, or one twice"),
        (lambda m: m["step_2"]["memory_candidates"][0][1].extend([3, 3]), "or one twice, in image"),
        (lambda m: m["step_2"]["memory_candidates"][0].append(1), "has 3 items"),
        (lambda m: m["step_2"]["memory_list"].pop(), "memory_list has other names"),
        (
            lambda m: [m["step_2"][k].append(v) for k, v in
                       (("memory_candidates", ["image21", [1]]), ("memory_list", "image21"))],
            "names image image21 twice",
        ),
        (lambda m: m.update(surplus={}), "'surplus' is no step_1, step_2"),
    ],
)  # fmt: skip
def test_wrong_replay_memories(tmp_path, change, says):
    tree = json.loads(json.dumps(MEMORY))
    change(tree)
    with pytest.raises(UserError, match=says):
        read_memory(tmp_path, tree)


# ------------------------------------------------------------------------------------------ history
@pytest.mark.parametrize("share", shares())
def test_a_damaged_history_never_stops_a_run(tmp_path, share):
    """No weight depends on it: it is put aside, and the log says so."""
    file = tmp_path / "history.json"
    history = History(tmp_path, torch.device("cpu"))
    for epoch in (1, 2):
        told = {"lr": 0.1, "images_per_s": 5.0, "seconds": 2.0, "whole": True}
        history.add(8, epoch=epoch, losses={"loss": 1.0}, **told)
    text = file.read_text()
    for words, content in damage.some(damage.of_json(text), share):
        file.write_bytes(content)
        again = History(tmp_path, torch.device("cpu"))
        again.resume(2)
        again.add(8, epoch=3, losses={"loss": 1.0})
        written = read_json(file, "file")
        assert written["epochs"][-1]["epoch"] == 3, words


# ---------------------------------------------------------------------------------------- to resume
@pytest.fixture(scope="module")
def stopped(tmp_path_factory, toy_root):
    """A config, its flags and the folder of a run that was stopped inside its second epoch."""
    from tests.helpers import write_config

    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(folder / "toy.json", toy_root)
    flags = ("--epochs", "3", "--bs", "16", "-r", "auto")
    calls = []

    def stop(self):
        calls.append(1)
        if len(calls) == 3:  # within an epoch of two iterations, after it, within the next
            raise Interrupted("stopped by a test.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.trainer.Ranks.stop_if_asked", stop)
        with pytest.raises(Interrupted):
            train(config, *flags)
    (last,) = folder.rglob("last.pth")
    return config, flags, last


class Resumed(Exception):
    """The training would go on."""


@pytest.fixture
def resume(stopped, tmp_path, monkeypatch):
    """A function that puts a checkpoint in the place of the good one and goes on from it."""
    config, flags, last = stopped
    good = last.read_bytes()

    def refuse(*args):
        raise Resumed

    monkeypatch.setattr(Trainer, "train_epoch", refuse)

    def call(checkpoint):
        last.unlink()
        torch.save(checkpoint, last)
        (last.parent / "previous.pth").unlink(missing_ok=True)
        try:
            train(config, *flags)
        except Resumed:
            return
        raise AssertionError("nothing was resumed")

    yield call
    last.unlink()
    last.write_bytes(good)


def put(tree, dotted, value):
    """A copy of nested dicts and lists with another value at one place."""
    name, _, rest = dotted.partition(".")
    key = int(name) if name.isdigit() and name not in tree else name
    below = put(tree[key], rest, value) if rest else value
    if isinstance(tree, dict):
        return {**tree, key: below}
    return [*tree[:key], below, *tree[key + 1 :]]


WRONG_TO_RESUME = {
    "iteration": [-1, 1.0, True, "1", 10**6, 2, None],
    "epoch": [-1, 1.0, True, "1", 10**6, 2],
    "finished": [0, None, "false"],
    "since_best": [-1, 10**6, "1"],
    "monitor_best": ["high", math.nan, []],
    "lr_scheduler.last_epoch": [0, -3, "3", 10**6],
    "task.steps": [[[1], "x"], None],
    "task.step": ["0", -1],
    "record": [None, {}, []],
    "record.settings": [[], {"a": {1, 2}}],
    "method_state": [None, []],
    "optimizer.param_groups": [[], [{"params": ["0"]}], [{"params": [0], "lr": 0.1}]],
    "optimizer.param_groups.0.weight_decay": ["much", 0.5],
    "optimizer.param_groups.0.lr": ["much", math.nan],
    "optimizer.state": [{}, [], {"x": {}}],
    "optimizer.state.1": [{"momentum_buffer": torch.ones(64, device="meta")}],
    "optimizer.state.0": [{}, None, {"momentum_buffer": None}, {"momentum_buffer": torch.ones(1)}],
    "rng": [[], None, [None]],
    "rng.0.torch": [None, torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)],
    "rng.0.numpy": [[], ["MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0]],
    "rng.0.python": [[3, [1, 2], None], [3, [-1] * 625, None], None],
}


@pytest.mark.parametrize("dotted", WRONG_TO_RESUME)
def test_wrong_checkpoints_to_resume(stopped, resume, dotted):
    good = files.load(stopped[2])
    assert fault(good, FORM) is None
    for value in WRONG_TO_RESUME[dotted]:
        with pytest.raises(UserError, match=r"checkpoint .*(" + dotted.split(".")[0] + ")|random"):
            resume(put(good, dotted, value))


def test_a_good_checkpoint_is_resumed(stopped, resume):
    good = files.load(stopped[2])
    assert (good["epoch"], good["iteration"]) == (1, 1)
    resume(good)


def test_a_checkpoint_whose_momentum_is_not_finite_is_refused(stopped, resume):
    good = files.load(stopped[2])
    buffer = good["optimizer"]["state"][0]["momentum_buffer"] * math.inf
    with pytest.raises(UserError, match=r"not finite: optimizer.state.0.momentum_buffer"):
        resume(put(good, "optimizer.state.0.momentum_buffer", buffer))


def test_weights_that_are_not_finite_are_skipped_for_the_older_checkpoint(stopped, tmp_path):
    good = files.load(stopped[2])
    torch.save(good, tmp_path / "previous.pth")
    bad = good["state_dict"] | {"cls.1.bias": good["state_dict"]["cls.1.bias"] * math.nan}
    torch.save({**good, "state_dict": bad}, tmp_path / "last.pth")
    stored, skipped = files.newest_good(tmp_path)
    assert stored.path == tmp_path / "previous.pth"
    assert "last.pth is of no use: 15 values of 1 tensors are not finite" in skipped[0]


@pytest.mark.slow
def test_damaged_checkpoints_to_resume(stopped, resume):
    good = files.load(stopped[2])
    rest = {key: value for key, value in good.items() if key != "state_dict"}
    rest["record"] = {**rest["record"], "settings": {}}

    def read(value):
        if isinstance(value, dict):
            record = value.get("record")
            if isinstance(record, dict) and record.get("settings") == {}:
                record = {**record, "settings": good["record"]["settings"]}
                value = {**value, "record": record}
            resume({**value, "state_dict": good["state_dict"]})

    outcomes(damage.some(damage.of_checkpoint(rest), SHARE), read)


def test_a_loss_scale_that_is_none():
    precision = Precision("cpu", torch.float16)
    precision.load_scale({})  # of a run without one
    precision.load_scale(precision.scaler.state_dict() | {"scale": 4.0})
    assert precision.scaler.get_scale() == 4
    for wrong in ({"scale": -1.0, "_growth_tracker": 0}, {"scale": 1.0}, {"scale": "1"}):
        with pytest.raises(UserError, match=r"the checkpoint to resume from: scaler\."):
            precision.load_scale(wrong)


@pytest.mark.parametrize("name", ["prototypes", "counts"])
def test_damaged_prototypes(name):
    task = make_task(
        "toy", {}, ["background", "a", "b"], name="x", setting="overlap", step=1, steps=[[1], [2]]
    )
    good = {"prototypes": torch.ones(2, 4), "counts": torch.ones(2).double()}
    SDR(task, {}).start(None, good)
    for wrong in (None, [1.0], torch.ones(3, 4), torch.ones(2).long()):
        with pytest.raises(UserError, match=rf"method_state\.{name} of the checkpoint is"):
            SDR(task, {}).start(None, good | {name: wrong})


# ------------------------------------------------------------------------------ before one is saved
def written(folder):
    return {path.name for path in folder.rglob("*") if path.suffix in (".pth", ".json")} - {
        "toy.json",
        "config.json",
    }


def test_a_last_update_that_overflows_is_no_result(toy_config):
    """One iteration in all: no loss is computed after the update."""
    with pytest.raises(UserError) as caught:
        train(toy_config, "--lr", "1e39", "--epochs", "1", "--bs", "40")
    message = str(caught.value)
    for part in ("step 0, epoch 1", "are not finite: weights.backbone", "--lr", "clip_grad_norm"):
        assert part in message
    assert written(toy_config.parent) <= {"history.json"}


def test_the_last_good_checkpoint_stays(toy_config, monkeypatch):
    """The last update of the last epoch overflows, and every loss that was read was finite."""
    original = Trainer.train_step

    def train_step(self, *args, **kwargs):
        if self.scheduler.last_epoch == 3:  # of 0 … 3
            for group in self.optimizer.param_groups:
                group["lr"] = 1e39
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(UserError, match=r"step 0, epoch 2, .* are not finite") as caught:
        train(toy_config, "--epochs", "2", "--bs", "16")
    (last,) = toy_config.parent.rglob("last.pth")
    assert f"-r {last} goes on from it" in str(caught.value)
    assert files.load(last)["epoch"] == 1
    assert written(toy_config.parent) == {"last.pth", "history.json"}
    monkeypatch.setattr(Trainer, "train_step", original)
    # What the message says: the config beside the checkpoint is used.
    argv = ["-r", str(last), "--save_dir", str(toy_config.parent / "runs")]
    run(ConfigParser.from_args("train", "configs/config_voc.json", argv=argv))
    assert files.load(last)["finished"]


def test_a_state_of_the_method_that_is_not_finite_is_no_result(toy_config, monkeypatch):
    from trainer.methods.dkd import DKD

    monkeypatch.setattr(DKD, "state", lambda self: {"mean": torch.tensor(math.nan)})
    with pytest.raises(UserError, match=r"not finite: method_state.mean \(1\)"):
        train(toy_config, "--epochs", "1", "--bs", "40")
    assert not list(toy_config.parent.rglob("*.pth"))


@pytest.mark.slow
def test_all_ranks_end_when_weights_are_not_finite(toy_config):
    with pytest.raises(UserError, match=r"step 0, epoch 1, .* are not finite"):
        train(
            *(toy_config, "--lr", "1e39", "--epochs", "1", "--bs", "20"),
            *("--multiprocessing_distributed", "--set", "n_gpu=2"),
        )
    assert not list(toy_config.parent.rglob("*.pth"))


# ----------------------------------------------------------------------- checkpoints of other code
class Settings:
    """What other code pickles beside its weights."""


@pytest.fixture
def foreign():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "a.num_batches_tracked": torch.tensor(3)}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return files.load(path)


def test_weights_alone_are_accepted(foreign, tmp_path):
    loaded = saved(tmp_path / "w.pth", foreign)
    assert loaded.keys() == {"state_dict"}
    assert all(torch.equal(loaded["state_dict"][name], value) for name, value in foreign.items())
    assert files.hash_of(tmp_path / "w.pth") == files.weights_hash(foreign)


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_read_as_numbers(foreign, tmp_path, zipped):
    content = {
        "state_dict": foreign,
        "epoch": np.int64(3),
        "monitor_best": np.float32(0.5),
        "metrics": {"iou": np.array([0.25, 1.0]), "best": [np.float64(0.75), np.bool_(True)]},
    }
    options = {"_use_new_zipfile_serialization": zipped}
    loaded = saved(tmp_path / "w.pth", content, **options)
    assert (type(loaded["epoch"]), loaded["epoch"]) == (int, 3)
    assert loaded["monitor_best"] == 0.5
    assert loaded["metrics"]["best"] == [0.75, True]
    assert loaded["metrics"]["iou"].tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda w: {"model_state": w, "epoch": 1}, "no 'state_dict'.* of model_state, epoch; save"),
        (lambda w: {"state_dict": w, "config": Settings()}, r"namely \S*Settings, which could run"),
        (lambda w: {"state_dict": w, "names": np.array(["a"], object)}, "cannot be read"),
    ],
)
def test_what_other_code_saves_is_told_apart(foreign, tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        saved(tmp_path / "w.pth", content(foreign))
