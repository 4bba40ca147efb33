"""Networks with weights filled by name, and a trainer around them without data or a run."""

import zlib

import numpy as np
import pytest
import torch

from models.model import DeepLabV3
from models.weights import load_strict
from tests.helpers import dkd_heads
from trainer.build import apply_fast
from trainer.methods import METHODS
from trainer.optim import build_optimizer, build_scheduler
from trainer.provenance import Provenance
from trainer.trainer import Trainer
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE

SWITCHES = ("channels_last", "fold_bn", "fused_optimizer")
WAYS = pytest.mark.parametrize(
    "fast", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "fast"]
)
HEADS = dkd_heads(1, 3, 2)


class Data:
    """What the trainer reads of a loader bundle before any loading."""

    def __init__(self, task):
        self.task = task


def make_config(step, scheduler, fast=True, **flags):
    """A config of step 0 or 1; `fast` turns the switches that are on by default on or off."""
    argv = [f"--{name}={value}" for name, value in flags.items()]
    argv += ["--task_name=15-5", f"--task_step={step}"] + (["--freeze_bn"] if step else [])
    default = "configs/config_voc.json" if scheduler == "PolyLR" else "configs/config_ade.json"
    config = ConfigParser.from_args("train", default, argv=argv)
    return ConfigParser(config.flat() | {f"fast.{name}": fast for name in SWITCHES})


def switched(step=1, optimizer="SGD", **on):
    """A config with only these switches on."""
    config = make_config(step, "PolyLR", fast=False, lr=1e-4)
    values = config.flat() | {f"fast.{name}": value for name, value in on.items()}
    if optimizer == "AdamW":
        values["optimizer.type"] = optimizer
        del values["optimizer.args.momentum"], values["optimizer.args.nesterov"]
    return ConfigParser(values)


def earlier_of(method, task):
    """What the previous step of a method hands on: SDR's prototypes for the tiny network."""
    if method != "sdr" or task.step == 0:
        return {}
    old = 1 + len(task.old)
    generator = torch.Generator().manual_seed(5)
    counts = torch.arange(old, dtype=torch.float64) * 10
    return {"prototypes": torch.rand(old, 512, generator=generator), "counts": counts}


def make_trainer(config, task, student, teacher=None, ranks=SINGLE, method="dkd"):
    earlier = earlier_of(method, task)
    method = METHODS[method](task, config["hyperparameter"])
    method.start(student, earlier)
    apply_fast(config, student, teacher, trains=True)
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, 10)
    return Trainer(
        config,
        ranks,
        data=Data(task),
        method=method,
        student=student.train(),
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
        provenance=Provenance(),
    )


def fill_by_name(model):
    state = {}
    for name, value in model.state_dict().items():
        shape, kind = tuple(value.shape), name.rsplit(".", 1)[1]
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        x = x.astype(np.float32)
        if kind == "num_batches_tracked":
            x = np.zeros((), np.int64)
        elif kind == "running_mean":
            x = 0.1 * x
        elif kind == "running_var":
            x = 1 + 0.1 * np.abs(x)
        elif x.ndim == 1 and kind == "weight":
            x = (0.2 if ".bn3." in name else 1) * (1 + 0.1 * x)
        elif x.ndim == 1:
            x = 0.1 * x
        else:
            x = x * np.sqrt(2 / np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(x)).to(value.dtype)
    load_strict(model, state, "weights filled by name")


def network(plan=HEADS, backbone="tiny", dtype=torch.float32, **kwargs):
    model = DeepLabV3(plan, backbone=backbone, dropout=False, **{"freeze_all_bn": True} | kwargs)
    fill_by_name(model)
    return model.to(dtype).train()
