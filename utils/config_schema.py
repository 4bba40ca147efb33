"""Every key of a config file and every flag that overrides one: what it may hold, what it means.

A new key or flag is a line here. Values of a `type` field
are resolved against registries elsewhere, and keys below `hyperparameter` belong to the methods.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.errors import listing

NUMBER = (int, float)
LARGEST = 2**63 - 1
# Generous, and finite: a file from elsewhere must not keep this machine busy for hours.
LONGEST_TEXT = 4096
LONGEST_LIST = 65_536
MOST_EPOCHS = 100_000
MOST_PROCESSES = 256
MOST_IMAGES = 65_536  # of a batch
LARGEST_CROP = 16_384
NULL = type(None)


@dataclass(frozen=True)
class Key:
    """What a leaf of the JSON file may hold."""

    doc: str
    types: tuple[type, ...]
    least: float | None = None  # inclusive
    above: float | None = None  # exclusive
    most: float | None = None  # inclusive
    choices: tuple[Any, ...] = ()
    plain_name: bool = False  # becomes a part of a folder name
    path: bool = False  # of a file or a folder, as `utils.text.path_of` takes it
    items: str = ""  # what a list holds, for the message
    decides: bool = True  # what the weights of a step become
    local: bool = False  # a file beside downloaded weights has no say in it

    def expected(self) -> str:
        """What is valid here, as words for a message."""
        if self.choices:
            return "one of " + listing(json.dumps(choice) for choice in self.choices)
        names = {str: "a non-empty string", bool: "true or false", NULL: "null"}
        names |= {float: "a number", list: f"a list of {self.items}"}
        if float not in self.types:
            names[int] = "a whole number"
        texts = [names[kind] for kind in self.types if kind in names]
        bounds = [
            f"{sign} {bound:.12g}"
            for sign, bound in ((">=", self.least), (">", self.above), ("<=", self.most))
            if bound is not None
        ]
        return " or ".join(texts) + (f" {' and '.join(bounds)}" if bounds else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value`, as JSON gave it, may stand here."""
        if isinstance(value, bool) or not isinstance(value, NUMBER):
            fits = type(value) in self.types
            if isinstance(value, (str, list)):
                fits &= len(value) <= (LONGEST_TEXT if isinstance(value, str) else LONGEST_LIST)
        else:
            fits = (
                isinstance(value, self.types)
                and (math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST)
                and (self.least is None or value >= self.least)
                and (self.above is None or value > self.above)
                and (self.most is None or value <= self.most)
            )
        return fits and (not self.choices or value in self.choices)


# Keys that only say where, how fast or how it is seen; and of these, those of this machine alone.
free = functools.partial(Key, decides=False)
local = functools.partial(free, local=True)


def _split(kind: str, images: str, key: Callable[..., Key]) -> dict[str, Key]:
    """The keys of one of the blocks `train`, `val`, `test` of `data_loader.args`."""
    where, batch = f"data_loader.args.{kind}", free if kind == "train" else local
    return {
        f"{where}.args.transform": key(
            f"resize and crop the {images} images; false: keep them whole", (bool,)
        ),
        f"{where}.args.transform_args.crop_size": key(
            "side of the crop in pixels", (int,), 1, most=LARGEST_CROP
        ),
        f"{where}.args.masking_value": key(
            f"label of hidden classes in {images} masks: 0 background, 255 not counted",
            (int,),
            choices=(0, 255),
        ),
        f"{where}.batch_size": batch(
            "images per process and iteration", (int,), 1, most=MOST_IMAGES
        ),
    }


# Every key of a config file, in the order of the shipped files, with what it means. Keys below
# `hyperparameter` are the method's own: their names are checked where the methods are known.
SCHEMA: dict[str, Key] = {
    "name": free("name of the run, a part of its folder's name", (str,), plain_name=True),
    "method": Key("which method of trainer/methods trains the step", (str,)),
    "n_gpu": local("processes started on a machine without CUDA", (int,), 1, most=MOST_PROCESSES),
    "multiprocessing_distributed": local("one process per GPU (without CUDA: n_gpu)", (bool,)),
    "rank": local("number of this node", (int,), 0, most=65_535),
    "world_size": local("number of nodes", (int,), 1, most=65_536),
    "dist_backend": local("process group on CUDA (CPU: gloo)", (str,), choices=("nccl", "gloo")),
    "dist_url": local(
        "where the processes meet: tcp://HOST:PORT or env:// (MASTER_ADDR and MASTER_PORT)", (str,)
    ),
    "seed": Key("seed of weights, samples and order", (int,), 0),
    "use_amp": Key("mixed precision in training, on CUDA", (bool,)),
    "eval_amp": free(
        "the same in validation, test and eval scripts; published figures are of float32", (bool,)
    ),
    "amp_dtype": Key("its data type", (str,), choices=("float16", "bfloat16")),
    "fast.channels_last": free("models and images with the channels innermost in memory", (bool,)),
    "fast.fold_bn": free(
        "frozen BatchNorm (the teacher's; with freeze_all_bn the student's) becomes a part of the "
        "convolution before it",
        (bool,),
    ),
    "fast.fused_optimizer": free(
        "one pass over the weights per update; on CUDA also no wait for the loss scale", (bool,)
    ),
    "fast.compile": local("torch.compile of student and teacher; needs a C++ compiler", (bool,)),
    "arch.type": Key("the model's class", (str,)),
    "arch.args.backbone": Key(
        "of models/backbone.py, such as resnet50, resnet101, resnet152, swin_t, swin_b, tiny (CPU "
        "demos, tests)",
        (str,),
    ),
    "arch.args.output_stride": Key(
        "image size over feature size; ResNet: 8 or 16, Swin: 32", (int,), choices=(8, 16, 32)
    ),
    "arch.args.norm_act": Key("bn_sync: BatchNorm + ReLU, synchronised over GPUs", (str,)),
    "arch.args.backbone_pretrained": Key(
        "true: ImageNet weights from torchvision; a path: from that file; false: none",
        (bool, str),
        path=True,
    ),
    "arch.args.freeze_all_bn": Key("keep statistics and affine of every BatchNorm", (bool,)),
    "arch.args.backbone_bn_momentum": Key(
        "momentum of the backbone's BatchNorm: how far a batch moves the statistics to its own",
        NUMBER,
        above=0,
        most=1,
    ),
    "data_loader.type": Key("the data set's loader bundle", (str,)),
    "data_loader.args.data_dir": free(
        "root of the data set; null: the environment (DKD_VOC_ROOT, DKD_ADE_ROOT), then the "
        "default (/dataset/VOC2012, /dataset/ADEChallengeData2016)",
        (str, NULL),
        path=True,
    ),
    "data_loader.args.follow_links": local(
        "accept files that symbolic links put outside the root of the data set", (bool,)
    ),
    # The maps decide, and the hash of the training data holds them.
    "data_loader.args.saliency_dir": free(
        "folder of saliency maps ID.png of the training images, not 0 = salient, for methods that "
        "read them; null: none",
        (str, NULL),
        path=True,
    ),
    "data_loader.args.class_names": Key(
        "names of a data set's own classes, background first", (list, NULL), items="names"
    ),
    "data_loader.args.task.name": free("the schedule, such as 15-1", (str,), plain_name=True),
    "data_loader.args.task.step": free(
        "the step to train or evaluate", (int,), 0, most=LONGEST_LIST
    ),
    "data_loader.args.task.setting": Key("overlap, disjoint or sequential", (str,)),
    "data_loader.args.task.idxs_path": free(
        "folder of image lists and of the class cache", (str,), path=True
    ),
    # The classes up to a step decide, and a task record holds those.
    "data_loader.args.task.steps": free(
        "own schedule: label ids of each step, [[1, 2], [3]]",
        (list, NULL),
        items="lists of ids",
    ),
    # The classes decide.
    "data_loader.args.task.joint": free(
        "joint training, the upper bound: learn the classes of all steps up to this one at once",
        (bool,),
    ),
    **_split("train", "training", Key),
    "data_loader.args.val.cross_val": Key(
        "validate on a fifth held out from the step's training images", (bool,)
    ),
    **_split("val", "validation", free),
    **_split("test", "test", free),
    "data_loader.args.num_workers": local(
        "loading processes per training process", (int,), 0, most=MOST_PROCESSES
    ),
    "data_loader.args.pin_memory": free("pinned host memory (CUDA only)", (bool,)),
    "data_loader.args.memory.mem_size": Key(
        "replayed old images; 0: no replay", (int,), 0, most=1_000_000
    ),
    "data_loader.args.memory.labels": Key(
        "labels of replayed images: current: of the classes of this step, as the published code; "
        "stored: also of the step whose image it was, for methods that learn old classes; "
        "all_seen: of all classes up to this step, whether or not they were ever labelled in it",
        (str,),
        choices=("current", "stored", "all_seen"),
    ),
    "data_loader.args.memory.mix": Key(
        "how replayed images come in: concat: added to the images of the step; half_batch: in "
        "place of a random half of each global batch, as SSUL-M",
        (str,),
        choices=("concat", "half_batch"),
    ),
    "data_loader.args.memory.candidates": Key(
        "where the classes of an image that may be kept are read: crop: in a random crop of its "
        "mask, as the published code; whole: in the whole mask",
        (str,),
        choices=("crop", "whole"),
    ),
    "optimizer.type": Key("the optimizer's class: SGD or AdamW", (str,)),
    "optimizer.args.lr": Key(
        "learning rate; which parts learn faster is the method's (DKD: all but the backbone, 10 "
        "times)",
        NUMBER,
        above=0,
    ),
    "optimizer.args.weight_decay": Key("weight decay of what it applies to", NUMBER, 0),
    "optimizer.args.momentum": Key("SGD: momentum", NUMBER, 0, most=1),
    "optimizer.args.nesterov": Key("SGD: Nesterov momentum", (bool,)),
    "optimizer.args.betas": Key(
        "AdamW: decay of the averages of gradient and square, default [0.9, 0.999]",
        (list,),
        items="two numbers",
    ),
    "optimizer.args.eps": Key("AdamW: added to the root, default 1e-8", NUMBER, above=0),
    "lr_scheduler.type": Key("the schedule's class", (str,)),
    "lr_scheduler.args.power": Key("exponent of the decay, default 0.9", NUMBER, above=0),
    "lr_scheduler.args.warmup_iters": Key(
        "WarmupPolyLR: share of the iterations that warm up", NUMBER, 0, most=1
    ),
    "lr_scheduler.args.min_lr": Key(
        "no group's learning rate falls below it, default 0", NUMBER, 0
    ),
    "evaluator.type": free("the evaluator's class", (str,)),
    "metrics": free("metrics to report, functions of utils/metric.py", (list,), items="names"),
    "trainer.epochs": Key("epochs of the step", (int,), 1, most=MOST_EPOCHS),
    # The global batch decides.
    "trainer.accumulate": free(
        "batches of each process whose gradients make one iteration; a larger batch on less memory",
        (int,),
        1,
        most=MOST_IMAGES,
    ),
    "trainer.clip_grad_norm": Key(
        "longest gradient of an update, a norm over all parameters; null: however long",
        (*NUMBER, NULL),
        above=0,
    ),
    "trainer.save_dir": local("folder of all runs", (str,), path=True),
    "trainer.save_period": free(
        "epochs between kept checkpoints; -1: the last only", (int,), -1, most=MOST_EPOCHS
    ),
    "trainer.keep": free(
        "of a finished step: all: also what training goes on from; weights: the weights; last: "
        "the weights of step 0 and of the newest step alone",
        (str,),
        choices=("all", "weights", "last"),
    ),
    "trainer.validation_period": free(
        "epochs between validations; -1: after the last", (int,), -1, most=MOST_EPOCHS
    ),
    "trainer.verbosity": free("0: warnings, 1: progress, 2: also details", (int,), 0, most=2),
    "trainer.monitor": free('"off", or "max NAME" / "min NAME" of a validation metric', (str,)),
    "trainer.early_stop": Key(
        "validations without a new best before stopping; -1: never", (int,), -1, most=MOST_EPOCHS
    ),
    "trainer.reset_best_mnt": free("forget the best value on resuming", (bool,)),
    "trainer.tensorboard": free(
        "write TensorBoard events: scalars, the config, pictures of validations", (bool,)
    ),
}
# The method judges these itself: it knows their names, types and ranges. Words and truth values
# wait for it.
HYPERPARAMETER = Key("setting of the method", NUMBER, 0)
# What released config.json files hold besides: accepted in every file and without effect.
RELEASED = {"test": Key("whether that run was a test", (bool,))}
# What it means that a config, or the record of a checkpoint, is older than a key.
OLDER = {"arch.args.backbone_bn_momentum": 0.01}
# Optional keyword arguments of the class in `type`: without them the class uses its own default.
OPTIONAL = {
    *(f"lr_scheduler.args.{name}" for name in ("power", "warmup_iters", "min_lr")),
    *(f"optimizer.args.{name}" for name in ("momentum", "nesterov", "betas", "eps")),
}

SECTIONS = {key.rsplit(".", n)[0] for key in SCHEMA for n in range(1, key.count(".") + 1)} | {
    "hyperparameter",
    "evaluator.args",
    "lr_scheduler.args",
}


@dataclass(frozen=True)
class StepRange:
    """What `--task_step` names when it is not one step.

    Attributes:
        first: the first of them.
        last: the last of them; None: the task's last.
    """

    first: int = 0
    last: int | None = None

    @property
    def kinds(self) -> set[int]:
        """Of the kinds that recipes tell apart, 0 the first step and 1 later ones, those in it."""
        last = 1 if self.last is None else self.last
        return {min(self.first, 1), min(last, 1)}


def task_steps(text: str) -> int | StepRange:
    """`3`, `all` or `2-5`."""
    if text == "all":
        return StepRange()
    if (span := re.fullmatch(r"(\d+)-(\d+)", text)) and int(span[1]) <= int(span[2]):
        return StepRange(int(span[1]), int(span[2]))
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no step; give a number, all, or a range such as 2-5"
        ) from None


@dataclass(frozen=True)
class Flag:
    """A command-line flag and the config key that it overrides."""

    names: tuple[str, ...]
    key: str
    convert: Callable[[str], Any] | None  # None: a boolean switch
    eval_too: bool = False


FLAGS = (
    Flag(("--multiprocessing_distributed",), "multiprocessing_distributed", None, True),
    Flag(("--dist_url",), "dist_url", str, True),
    Flag(("--name",), "name", str, True),
    Flag(("--save_dir",), "trainer.save_dir", str, True),
    Flag(("--data_dir",), "data_loader.args.data_dir", str, True),
    Flag(("--follow_links",), "data_loader.args.follow_links", None, True),
    Flag(("--saliency_dir",), "data_loader.args.saliency_dir", str),
    Flag(("--method",), "method", str),
    Flag(("--mem_size",), "data_loader.args.memory.mem_size", int),
    Flag(("--seed",), "seed", int),
    Flag(("--ep", "--epochs"), "trainer.epochs", int),
    Flag(("--accumulate",), "trainer.accumulate", int),
    Flag(("--lr", "--learning_rate"), "optimizer.args.lr", float),
    Flag(("--bs", "--batch_size"), "data_loader.args.train.batch_size", int),
    Flag(("--task_name",), "data_loader.args.task.name", str, True),
    Flag(("--task_step",), "data_loader.args.task.step", task_steps, True),
    Flag(("--task_setting",), "data_loader.args.task.setting", str),
    Flag(("--joint",), "data_loader.args.task.joint", None),
    Flag(("--pos_weight",), "hyperparameter.pos_weight", float),
    Flag(("--mbce",), "hyperparameter.mbce", float),
    Flag(("--kd",), "hyperparameter.kd", float),
    Flag(("--dkd_pos",), "hyperparameter.dkd_pos", float),
    Flag(("--dkd_neg",), "hyperparameter.dkd_neg", float),
    Flag(("--ac",), "hyperparameter.ac", float),
    Flag(("--freeze_bn",), "arch.args.freeze_all_bn", None),
)


def key_of(dotted: str) -> Key:
    """What the key `dotted` may hold."""
    if dotted.startswith("hyperparameter."):
        return HYPERPARAMETER
    return RELEASED[dotted] if dotted in RELEASED else SCHEMA[dotted]
