"""Wrong input, as one table: exit code 2, one sentence that names the fault, nothing written.

Each case takes the whole way of the entry scripts; some are also run as real processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from base.base_model import HeadPlan
from models.backbone import BACKBONES
from models.model import DeepLabV3
from scripts.toy_data.shapes import CLASS_NAMES
from tests.helpers import PROJECT, dkd_heads
from trainer.entry import step_configs
from trainer.plan import plan_run
from trainer.run import run
from utils.errors import EXIT_USER_ERROR, one_sentence_errors
from utils.parse_config import ConfigParser

DATA, TASK = "data_loader.args", "data_loader.args.task"


@pytest.fixture
def workplace(tmp_path, toy_root, monkeypatch) -> Path:
    """An empty folder to run in, with the small config of a good run as `config.json`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DKD_VOC_ROOT", "no_such_root")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    write_good_config(toy_root)
    return tmp_path


def write_good_config(data_dir: Path) -> None:
    tree: dict[str, Any] = {}
    put(tree, "arch.args.backbone", "tiny")
    put(tree, "arch.args.backbone_pretrained", False)
    put(tree, "trainer.save_dir", "runs")
    put(tree, f"{DATA}.data_dir", str(data_dir))
    put(tree, f"{DATA}.class_names", CLASS_NAMES)
    put(tree, f"{DATA}.num_workers", 0)
    put(tree, f"{TASK}.name", "15-5")
    put(tree, f"{TASK}.idxs_path", "lists")
    Path("config.json").write_text(json.dumps(tree))


def put(tree: dict[str, Any], dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def change_config(**values: object) -> None:
    tree = json.loads(Path("config.json").read_text())
    for dotted, value in values.items():
        put(tree, dotted, value)
    Path("config.json").write_text(json.dumps(tree))


def write(name: str, text: str = "") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


@dataclass(frozen=True)
class Case:
    """A wrong input: what is prepared, the command line, and what the sentence must say."""

    says: list[str]
    flags: str = ""
    mode: str = "train"
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda monkeypatch: None

    def lay_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prepare the working folder, in which the good config lies."""
        change_config(**self.config)
        for name, text in self.files.items():
            write(name, text)
        self.prepare(monkeypatch)


def start(flags: str = "", mode: str = "train", config: str = "-c config.json") -> None:
    """What the entry scripts do."""
    argv = shlex.split(f"{config} {flags}")
    with one_sentence_errors():
        run(*step_configs(ConfigParser.from_args(mode, "configs/config_voc.json", argv=argv)))


def check_it(flags: str = "", mode: str = "train") -> None:
    argv = ["-c", "config.json", *shlex.split(flags)]
    plan_run([ConfigParser.from_args(mode, "configs/config_voc.json", argv=argv)])


def save_weights(name: str, plan: HeadPlan, **more: Any) -> None:
    """A weight file of the tiny model, as a finished run leaves it."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    model = DeepLabV3(plan, backbone="tiny")
    torch.save({"state_dict": model.state_dict(), "epoch": 3, **more}, name)


def test_the_config_of_these_tests_is_good(workplace):
    check_it()
    check_it("--task_name 19-1 --task_setting disjoint --lr 0.5 -d cpu --method finetune --mbce 2")
    save_weights("w.pth", dkd_heads(1, 15))
    check_it("-r w.pth", mode="eval")
    assert sorted(path.name for path in workplace.rglob("*")) == ["config.json", "w.pth"]


SPAWN = "--multiprocessing_distributed"

WRONG_FLAGS = [
    ("--ep 0", ["--epochs", "trainer.epochs is 0", "whole number >= 1"]),
    ("--epochs 1.5", ["--epochs", "invalid int value: '1.5'"]),
    ("--ep", ["--epochs", "expected one argument"]),
    ("--lr nan", ["--learning_rate", "optimizer.args.lr is nan", "a number > 0"]),
    ("--lr inf", ["--learning_rate", "optimizer.args.lr is inf", "a number > 0"]),
    ("--lr 0", ["--learning_rate", "optimizer.args.lr is 0.0", "a number > 0"]),
    ("--lr -1", ["--learning_rate", "optimizer.args.lr is -1.0", "a number > 0"]),
    ("--lr fast", ["--learning_rate", "invalid float value: 'fast'"]),
    ("--bs 0", ["--batch_size", "train.batch_size is 0", "whole number >= 1"]),
    ("--bs many", ["--batch_size", "invalid int value: 'many'"]),
    ("--seed -1", ["--seed", "seed is -1", "whole number >= 0"]),
    ("--seed x", ["--seed", "invalid int value: 'x'"]),
    ("--mem_size -1", ["--mem_size", "mem_size is -1", "whole number >= 0"]),
    ("--mem_size all", ["--mem_size", "invalid int value: 'all'"]),
    ("--accumulate 0", ["--accumulate", "trainer.accumulate is 0", "whole number >= 1"]),
    ("--bs 6 --accumulate 9", ["48 training images", "6 ×", "× 9 accumulated", "= 54", "smaller"]),
    ("--method finetune --ac 0", ["hyperparameter.ac", "no setting of 'finetune', but of dkd"]),
    ("--task_step 5-2", ["--task_step", "'5-2' is no step", "all, or a range such as 2-5"]),
    ("--task_step 0-9", ["--task_step is 0-9", "the steps 0, 1"]),
    ("--task_step all -r w.pth", ["no file w.pth"]),
    ("--bs 1000", ["48 training images", "1000 × 1 process(es)", "choose a smaller one"]),
    ("-d 7", ["-d/--device is '7'", "GPU 7 does not exist", "visible: "]),
    ("-d 0,0", ["-d/--device is '0,0'", "a GPU is named twice"]),
    ("--save_dir /proc/runs", ["trainer.save_dir (--save_dir)", "/proc", "choose another"]),
    ("--base nowhere", ["--base nowhere holds no checkpoint-epoch*.pth", "step_0 folder"]),
    ("--pos_weight -1", ["--pos_weight", "hyperparameter.pos_weight is -1.0", "number >= 0"]),
    ("--mbce -1", ["--mbce", "hyperparameter.mbce is -1.0", "number >= 0"]),
    ("--kd nan", ["--kd", "hyperparameter.kd is nan", "number >= 0"]),
    ("--kd x", ["--kd", "invalid float value: 'x'"]),
    ("--dkd_pos inf", ["--dkd_pos", "hyperparameter.dkd_pos is inf", "number >= 0"]),
    ("--dkd_neg -1", ["--dkd_neg", "hyperparameter.dkd_neg is -1.0", "number >= 0"]),
    ("--ac -0.1", ["--ac", "hyperparameter.ac is -0.1", "number >= 0"]),
    ("--freeze_bn=yes", ["--freeze_bn", "'yes'"]),
    (f"{SPAWN}=1", [SPAWN, "'1'"]),
    ("--test=1", ["--test", "'1'"]),
    ("--name a/b", ["--name", "'a/b'", "folder name", "letters, digits"]),
    ("--name ''", ["--name", "a non-empty string"]),
    ("--task_name ../x", ["--task_name", "'../x'", "folder name"]),
    ("--task_name 15-2", ["task.name is '15-2'", "did you mean '15-5'?", "joint, 19-1, 15-5"]),
    ("--task_name 100-50", ["task.name is '100-50'", "valid: joint, 19-1"]),
    ("--task_setting overlapp", ["task.setting", "'overlap'?", "overlap, disjoint, sequential"]),
    ("--task_step -1", ["--task_step", "task.step is -1", "whole number >= 0"]),
    ("--task_step first", ["--task_step", "'first' is no step; give a number, all, or a range"]),
    ("--task_step 2", ["task.step is 2", "task '15-5' has the steps 0, 1"]),
    ("--task_step 1", ["step 1 continues from step 0", "overlap_15-5_DKD/step_0", "--save_dir"]),
    ("--method plob", ["method is 'plob'", "did you mean 'plop'?", "valid: dkd, finetune"]),
    ("--method mib --mem_size 9", ["'mib' has no replay memory", "to 0", "dkd, finetune, ssul"]),
    ("--method ssul", ["a saliency map of every training image", "is null", "--saliency_dir"]),
    ("--method ssul --saliency_dir nowhere", ["the folder nowhere does not exist"]),
    ("--method mib --saliency_dir .", ["'mib' with these settings reads no saliency maps", "null"]),
    ("--method Finetune", ["method is 'Finetune'", "did you mean 'finetune'?"]),
    ("--data_dir nowhere", ["folder nowhere does not exist", "--data_dir", "DKD_VOC_ROOT"]),
    ("-d x", ["-d/--device is 'x'", "0,1, or cpu"]),
    ("-d 0,,1", ["-d/--device is '0,,1'", "0,1, or cpu"]),
    ("-d ''", ["-d/--device is ''", "0,1, or cpu"]),
    ("-r nowhere.pth", ["-r/--resume", "no file nowhere.pth"]),
    ("-c nowhere.json", ["config file nowhere.json does not exist"]),
    ("--frezze_bn", ["unrecognized arguments: --frezze_bn", "--help"]),
    ("train", ["unrecognized arguments: train", "--help"]),
    (f"{SPAWN} --dist_url host", ["dist_url is 'host'", "tcp://HOST:PORT"]),
    (f"{SPAWN} --dist_url tcp://localhost:99999", ["tcp://localhost:99999", "tcp://HOST:PORT"]),
    (f"{SPAWN} --dist_url tcp://192.0.2.1:23", ["tcp://192.0.2.1:23", "cannot listen there"]),
    (f"{SPAWN} --dist_url env://", ["'env://'", "no MASTER_ADDR, MASTER_PORT; set"]),
    (f"{SPAWN} --dist_url file:///meet", ["'file:///meet'", "tcp://HOST:PORT or env://"]),
]


WRONG_FLAGS_OF_AN_EVALUATION = [
    ("", ["arguments are required: -r/--resume"]),
    ("-r nowhere.pth", ["-r/--resume", "no file nowhere.pth"]),
    ("-r auto", ["-r/--resume", "no file auto"]),
    ("-r config.json --lr 0.1", ["unrecognized arguments: --lr 0.1"]),
    ("-r config.json -d gpu", ["-d/--device is 'gpu'"]),
    ("-r config.json --data_dir nowhere", ["folder nowhere does not exist"]),
    (
        "-r config.json",
        ["checkpoint config.json cannot be read: it is a text that begins"],
    ),
]


WRONG_VALUES = [
    ("arch.type", "DeepLab", ["arch.type is 'DeepLab'", "did you mean 'DeepLabV3'?"]),
    ("arch.args.backbone", "resnet18", ["arch.args.backbone", "resnet50, resnet101, resnet152"]),
    ("arch.args.backbone", "swin_b", ["output_stride is 16", "'swin_b' does not offer", "32"]),
    ("arch.args.norm_act", "iabn_sync", ["arch.args.norm_act 'iabn_sync'", "use 'bn_sync'"]),
    ("arch.args.norm_act", "group", ["arch.args.norm_act is 'group'", "valid: bn_sync"]),
    ("arch.args.backbone_pretrained", True, ["no ImageNet weights", "'tiny'", "to false"]),
    ("arch.args.output_stride", 4, ["config.json: arch.args.output_stride is 4", "8, 16"]),
    ("amp_dtype", "float32", ["amp_dtype", '"float16", "bfloat16"']),
    ("dist_backend", "mpi", ["dist_backend", '"nccl", "gloo"']),
    ("arch.args.output_stride", 32, ["output_stride is 32", "'tiny' does not offer", "8, 16."]),
    ("optimizer.type", "Adam", ["optimizer.type is 'Adam'", "valid: SGD, AdamW"]),
    ("optimizer.args.eps", 1e-6, ["eps is no argument of SGD", "lr, weight_decay, momentum, nest"]),
    (
        "optimizer",
        {"type": "AdamW", "args": {"momentum": 0.9}},
        ["momentum is no argument of AdamW", "valid: lr, weight_decay, betas, eps"],
    ),
    (
        "optimizer",
        {"type": "AdamW", "args": {"betas": [0.9, 1]}},
        ["optimizer.args.betas is [0.9, 1]", "two numbers >= 0 and below 1"],
    ),
    (
        "optimizer",
        {"type": "AdamW", "args": {"betas": [0.9]}},
        ["optimizer.args.betas is [0.9]", "two numbers"],
    ),
    ("optimizer.args.momentum", 0, ["optimizer.args.nesterov", "momentum above 0"]),
    ("lr_scheduler.type", "Poly", ["lr_scheduler.type", "'PolyLR'?", "PolyLR, WarmupPolyLR"]),
    ("lr_scheduler.args.warmup_iters", 0.1, ["warmup_iters is no argument of PolyLR", "power"]),
    ("evaluator.type", "Judge", ["evaluator.type is 'Judge'", "valid: Evaluator"]),
    ("data_loader.type", "ADEIncrementalDataLoader", ["data_loader.type", "VOCIncremental"]),
    (
        "hyperparameter.dkd_po",
        1,
        ["hyperparameter.dkd_po is no setting of 'dkd'", "'dkd_pos'?", "dkd_neg, ac"],
    ),
    ("metrics", [], ["metrics is empty", "Pixel_Accuracy, Pixel_Accuracy_Class, Mean_"]),
    ("metrics", ["Pixel_Acuracy"], ["entry of metrics", "did you mean 'Pixel_Accuracy'?"]),
    ("metrics", [1], ["entry of metrics is '1'", "valid: Pixel_Accuracy"]),
    ("trainer.early_stop", 3, ["trainer.early_stop needs trainer.monitor"]),
    ("trainer.monitor", "on", ["trainer.monitor is 'on'", '"max NAME"', "val_Pixel_Accuracy_ov"]),
    ("trainer.monitor", "max ", ["trainer.monitor is 'max '", "NAME one of val_Pixel_Accuracy"]),
    (
        "trainer.monitor",
        "max val_Mean_Intersection_over_Union_base",
        ["trainer.monitor", "val_Mean_Intersection_over_Union_base', which does not exist"],
    ),
    ("trainer.verbosity", 3, ["trainer.verbosity is 3", ">= 0 and <= 2"]),
    ("trainer.epoch", 3, ["config.json: unknown key 'trainer.epoch'", "did you mean 'epochs'?"]),
    ("rank", 1, ["rank is 1", "world_size is 1"]),
    (
        f"{DATA}.train.args.transform_args.crop_size",
        0,
        ["train.args.transform_args.crop_size is 0"],
    ),
    (f"{DATA}.val.args.masking_value", 1, ["val.args.masking_value is 1", "one of 0, 255"]),
    (f"{DATA}.train.args.transform", False, ["train.args.transform is false", "batch_size to 1"]),
    (f"{DATA}.num_workers", -1, ["num_workers is -1", "whole number >= 0"]),
    (f"{DATA}.data_dir", None, ["no_such_root does not exist", "DKD_VOC_ROOT"]),
    (f"{DATA}.class_names", [], ["class_names has 0 names", "between 2 and 65535"]),
    (f"{DATA}.class_names", [*map(str, range(65536))], ["class_names has 65536 names"]),
    (f"{DATA}.class_names", ["b", "cat", "cat"], ["class_names", "'cat' more than once"]),
    (f"{DATA}.class_names", ["b", 1], ["class_names must be a list of names"]),
    (f"{DATA}.class_names", ["b", ""], ["class_names must be a list of names"]),
    (
        f"{DATA}.class_names",
        ["b", "cat"],
        ["'15-5' names the label id 2", "classes are 1;", "class_names"],
    ),
    (f"{TASK}.steps", [], ["task.steps is empty", "[[1, 2], [3]]"]),
    (f"{TASK}.steps", [[1], []], ["task.steps[1] must be a list of at least one label id"]),
    (f"{TASK}.steps", [1, 2], ["task.steps[0] must be a list of at least one label id"]),
    (f"{TASK}.steps", ["12"], ["task.steps[0] must be a list of at least one label id"]),
    (f"{TASK}.steps", [[1], ["2"]], ["task.steps[1] must be a list of at least one label id"]),
    (f"{TASK}.steps", [[True]], ["task.steps[0] must be a list of at least one label id"]),
    (f"{TASK}.steps", [[1, 2], [2]], ["task.steps names label id 2 more than once"]),
    (f"{TASK}.steps", [[1], [0]], ["label id 0", "1..20", "task.steps"]),
    (f"{TASK}.steps", [[1], [21]], ["label id 21", "1..20", "task.steps"]),
    (f"{DATA}.memory.labels", "future", ["memory.labels", '"current", "stored"']),
    (f"{DATA}.memory.candidates", "half", ["memory.candidates", '"crop", "whole"']),
]


@pytest.mark.parametrize("kind", ["val", "test"])
def test_batch_of_one_untransformed_image_is_fine(kind, workplace):
    change_config(**{f"{DATA}.{kind}.args.transform": False})
    check_it()


LISTS = "own/ImageSets/Segmentation"
FOLDER = "runs/models/overlap_15-5_DKD/step_0"


WRONG_FILES = [
    ({"bad.json": '{\n "name": }'}, "-c bad.json", ["bad.json, line 2, column 10", "JSON"]),
    ({"own/x": ""}, "--data_dir own", [f"{LISTS}/train_aug.txt does not exist"]),
    ({"own": ""}, "--data_dir own", ["own does not exist", "--data_dir"]),
    ({f"{LISTS}/train_aug.txt": "a"}, "--data_dir own", [f"{LISTS}/val.txt does not exist"]),
    ({f"{LISTS}/train_aug.txt": "\n"}, "--data_dir own", ["own", "train list", "empty"]),
    (
        {f"{LISTS}/train_aug.txt": "a", f"{LISTS}/val.txt": "b\nc\n\nb\n"},
        "--data_dir own",
        ["val.txt, line 4: image b stands in the list twice", "val.txt, line 1"],
    ),
    (
        {f"{LISTS}/train_aug.txt": "/a.jpg /a.png 1"},
        "--data_dir own",
        ["train_aug.txt, line 1: '/a.jpg /a.png 1'", "IMAGE_PATH MASK_PATH"],
    ),
    (
        {f"{FOLDER}/checkpoint-epoch3.pth": ""},
        "",
        [FOLDER, "already holds a run", "-r", "--test"],
    ),
    ({f"{FOLDER}/last.pth": ""}, "", [FOLDER, "already holds a run", "-r auto"]),
    ({f"{FOLDER}/last.pth": ""}, "--task_step 1", ["step_0 holds no checkpoint-epoch"]),
    (
        {
            f"{LISTS}/train_aug.txt": "a\n/../../etc/passwd.jpg /SegmentationClassAug/b.png",
            f"{LISTS}/val.txt": "c",
        },
        "--data_dir own",
        ["train_aug.txt, line 2", "etc/passwd.jpg leaves the data set's folder own"],
    ),
]


CORNER_CASES = {
    "one image per batch": ({}, "--bs 1", ["--batch_size", "--freeze_bn"]),
    "a newline in a value": ({}, "--name 'a\nb'", ["--name"]),
    "an empty -r": ({}, "-r ''", ["--resume"]),
    "a test before any training": ({}, "--test", ["--test", "-r"]),
    "a save_dir that is a file": ({}, "--save_dir config.json", ["save_dir"]),
    "an empty save_dir": ({}, "--save_dir ''", ["save_dir"]),
    "a name that is too long": ({}, f"--name {300 * 'a'}", ["--name", "at most 100"]),
    "a number beyond 64 bits": ({}, f"--ep {400 * '9'}", ["--epochs"]),
    "a misspelt flag": ({}, "--frezze_bn", ["did you mean '--freeze_bn'?"]),
    "no weight file": (
        {"arch.args.backbone": "resnet50", "arch.args.backbone_pretrained": "no.pth"},
        "",
        ["arch.args.backbone_pretrained", "no.pth"],
    ),
}


class _Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def full_disk(monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def weights_of(*sizes: int, name: str = "w.pth", **more: Any) -> Callable[[Any], None]:
    return lambda monkeypatch: save_weights(name, dkd_heads(*sizes), **more)


def truncated(monkeypatch):
    save_weights("w.pth", dkd_heads(1, 15))
    whole = Path("w.pth").read_bytes()
    Path("w.pth").write_bytes(whole[: len(whole) // 2])


def one_bit_flipped(monkeypatch):
    save_weights("w.pth", dkd_heads(1, 15))
    whole = bytearray(Path("w.pth").read_bytes())
    whole[len(whole) // 2] ^= 1
    Path("w.pth").write_bytes(whole)


def malicious(monkeypatch):
    torch.save({"state_dict": _Malicious()}, "w.pth")


def own_base(monkeypatch):
    save_weights(f"{FOLDER}/checkpoint-epoch3.pth", dkd_heads(1, 15), finished=True)


def two_steps(monkeypatch):
    for step in (0, 1):
        folder = FOLDER.replace("15-5", "15-1").replace("step_0", f"step_{step}")
        plan = dkd_heads(*(1, 15, 1)[: step + 2])
        save_weights(f"{folder}/checkpoint-epoch3.pth", plan, finished=True)


BASE = f"{FOLDER}/checkpoint-epoch3.pth"
TOWARDS_1 = "--name DKD --task_step 1 --method"


def trained_by(method: str, family: str) -> Callable[[Any], None]:
    """The step 0 of a method."""
    plan = HeadPlan((1, 15))
    more = {"finished": True, "method": method, "family": family}
    return lambda monkeypatch: save_weights(BASE, plan, **more)


def stopped_mib(monkeypatch):
    """Step 1 of MiB, inside its second epoch, on top of its step 0."""
    trained_by("mib", "background")(monkeypatch)
    save_weights("w.pth", HeadPlan((1, 15, 5)), method="mib", family="background", finished=False)


def without_stages(monkeypatch):
    bare = dataclasses.replace(BACKBONES["tiny"], stages=False)
    monkeypatch.setitem(BACKBONES, "bare", bare)


PREPARED = {
    "no free disk": Case(
        ["trainer.save_dir (--save_dir)", "1 MiB left", "make room"], prepare=full_disk
    ),
    "weights of another number of classes": Case(
        ["weight file w.pth does not fit", "cls.1.weight [19", "instead of [15"],
        *("-r w.pth", "eval"),
        prepare=weights_of(1, 19),
    ),
    "weights of another step": Case(
        ["weight file w.pth does not fit", "unexpected: cls.2.bias"],
        *("-r w.pth", "eval"),
        prepare=weights_of(1, 15, 5),
    ),
    "weights of another backbone": Case(
        ["weight file w.pth does not fit", "missing: "],
        *("-r w.pth", "eval"),
        config={"arch.args.backbone": "resnet50"},
        prepare=weights_of(1, 15),
    ),
    "a truncated weight file": Case(["checkpoint w.pth"], "-r w.pth", "eval", prepare=truncated),
    "a weight file with one wrong bit": Case(
        ["checkpoint w.pth cannot be read: damaged, the checksum of its record"],
        *("-r w.pth", "eval"),
        prepare=one_bit_flipped,
    ),
    "a weight file that would run code": Case(
        ["checkpoint w.pth", "could run code; it is not loaded"],
        *("-r w.pth", "eval"),
        prepare=malicious,
    ),
    "a checkpoint without a state_dict": Case(
        ["checkpoint w.pth holds no 'state_dict'"],
        *("-r w.pth", "eval"),
        prepare=lambda monkeypatch: torch.save({"model": {}}, "w.pth"),
    ),
    "a previous step of other classes": Case(
        ["step 0's checkpoint", "does not fit the model", "cls.1.weight [19"],
        "--task_step 1 --freeze_bn",
        prepare=weights_of(1, 19, name=BASE),
    ),
    "a previous step that has the new head": Case(
        ["already has cls.2.weight", "not the weights of the step before"],
        "--task_step 1 --freeze_bn",
        prepare=weights_of(1, 15, 5, name=BASE),
    ),
    "an unfinished previous step": Case(
        ["is not of a finished run", "--task_step 0 -r auto"],
        "--task_step 1 --freeze_bn",
        prepare=weights_of(1, 15, name=BASE, finished=False),
    ),
    "a checkpoint of another number of classes to resume from": Case(
        ["the checkpoint to resume from, w.pth, does not fit"],
        "-r w.pth",
        prepare=weights_of(1, 19),
    ),
    "--base at a later step": Case(
        ["--base takes another run's step 0", "this is step 1", "--task_step 0"],
        "--task_step 1 --freeze_bn --base other",
        prepare=own_base,
    ),
    "--base without a record": Case(
        ["--base", "with a record of its settings"],
        f"--name other --base {FOLDER}",
        prepare=own_base,
    ),
    "--base of this very run": Case(
        ["is this run's own folder"], f"--base {FOLDER}", prepare=own_base
    ),
    "--base and -r": Case(
        ["--base and -r exclude each other"],
        f"--name other --base {FOLDER} -r {BASE}",
        prepare=own_base,
    ),
    "a backbone without stages": Case(
        ["'plop' compares the maps of a backbone's stages", "'bare' has none", "resnet50", "tiny"],
        f"{TOWARDS_1} plop",
        config={"arch.args.backbone": "bare"},
        prepare=without_stages,
    ),
    "a step 0 without prototypes": Case(
        ["'sdr' continues from prototypes", "keeps none", "train step 0 with --method sdr"],
        f"{TOWARDS_1} sdr",
        prepare=trained_by("ft", "background"),
    ),
    "a step 0 of another family": Case(
        [BASE, "by 'dkd': its channel 0 is an auxiliary head", "'mib' needs the background class"],
        f"{TOWARDS_1} mib",
        prepare=trained_by("dkd", "auxiliary"),
    ),
    "a checkpoint of another method to resume from": Case(
        ["to resume from, w.pth, was trained with method 'mib'", "'plop'; give --method mib"],
        f"{TOWARDS_1} plop -r w.pth",
        prepare=stopped_mib,
    ),
    "no memory of the step before": Case(
        ["memory list", "step_1/memory.json does not exist"],
        "--task_name 15-1 --task_step 2 --freeze_bn --mem_size 10",
        prepare=two_steps,
    ),
    "an ImageNet weight file of another backbone": Case(
        ["weight file w.pth for arch.args.backbone 'swin_t' does not fit", "missing: features.0.0"],
        config={
            "arch.args.backbone": "swin_t",
            "arch.args.output_stride": 32,
            "arch.args.backbone_pretrained": "w.pth",
        },
        prepare=lambda monkeypatch: torch.save(BACKBONES["tiny"].build(16).state_dict(), "w.pth"),
    ),
    "a node outside the run": Case(
        ["rank is 2", "world_size is 2", "0..1"], SPAWN, config={"rank": 2, "world_size": 2}
    ),
    **{
        f"a batch of untransformed {kind} images": Case(
            [f"{kind}.args.transform is false", f"{kind}.batch_size to 1"],
            config={f"{DATA}.{kind}.args.transform": False, f"{DATA}.{kind}.batch_size": 2},
        )
        for kind in ("val", "test")
    },
}

CASES = {
    **{f"flag: {flags}": Case(says, flags) for flags, says in WRONG_FLAGS},
    **{f"eval: {flags}": Case(says, flags, "eval") for flags, says in WRONG_FLAGS_OF_AN_EVALUATION},
    **{
        f"value {number}: {key}": Case(says, config={key: value})
        for number, (key, value, says) in enumerate(WRONG_VALUES)
    },
    **{
        f"files {number}: {flags}": Case(says, flags, files=files)
        for number, (files, flags, says) in enumerate(WRONG_FILES)
    },
    **{
        name: Case(says, flags, config=config)
        for name, (config, flags, says) in CORNER_CASES.items()
    },
    **PREPARED,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrong_input(case, workplace, monkeypatch, capsys):
    """Exit code 2, one sentence with every part of `says`, no traceback, nothing on disk."""
    case.lay_out(monkeypatch)
    before = set(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        start(case.flags, case.mode)
    assert ended.value.code == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    program, _, sentence = err.partition(": error: ")
    assert program == Path(sys.argv[0]).name
    assert sentence.endswith(".\n")
    assert sentence.count("\n") == 1
    assert "Traceback" not in out + err
    for part in case.says:
        assert part in sentence
    assert set(Path().rglob("*")) == before


def test_weight_file_for_the_tiny_backbone(workplace):
    torch.save(BACKBONES["tiny"].build(16).state_dict(), "w.pth")
    change_config(**{"arch.args.backbone_pretrained": "w.pth"})
    check_it()


def test_unknown_hyperparameter_beside_a_weight(workplace):
    change_config(**{"hyperparameter.unkd": 3})
    save_weights("w.pth", dkd_heads(1, 15))
    plan_run([ConfigParser.from_args("eval", "configs/config_voc.json", argv=["-r", "w.pth"])])


# ------------------------------------------------------------------------------ real processes
@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("train_voc.py", "--ep 0", "flag --epochs: trainer.epochs is 0"),
        ("eval_voc.py", "", "-r/--resume"),
        ("train_voc.py", "-c {config} --task_name 15-2", "did you mean '15-5'?"),
        pytest.param(
            *("train_voc.py", "-c {config} --task_step 1 --save_dir {runs}"),
            "step 1 continues from",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_process_ends_with_one_line_and_code_2(script, flags, says, workplace):
    before = set(workplace.rglob("*"))
    words = flags.format(config=workplace / "config.json", runs=workplace / "runs").split()
    environment = {name: os.environ[name] for name in os.environ if name != "DKD_VOC_ROOT"}
    command = [sys.executable, script, *words]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert set(workplace.rglob("*")) == before
