"""Three iterations of step 0 and three of step 1 of the full ResNet-101 model, through the trainer.

The golden values come from the reference's formulas on CPU in float32. Model, method, optimizer,
schedule and `Trainer.train_step` are those of a real run; only the weights are filled by name.
"""

import zlib

import numpy as np
import pytest
import torch

from base.task import Task
from models.weights import load_previous_step, load_strict
from tests.conftest import DATA
from trainer.methods import METHODS
from trainer.optim import build_optimizer, build_scheduler
from trainer.run import build_model
from trainer.trainer import Trainer
from utils.distributed import SINGLE
from utils.parse_config import ConfigParser


class Data:
    """What the trainer reads of a loader bundle before any loading."""

    def __init__(self, task):
        self.task = task


def make_config(step, scheduler, **flags):
    argv = [f"--{name}={value}" for name, value in flags.items()]
    argv += ["--task_name=15-5", f"--task_step={step}"] + (["--freeze_bn"] if step else [])
    default = "configs/config_voc.json" if scheduler == "PolyLR" else "configs/config_ade.json"
    return ConfigParser.from_args("train", default, argv=argv)


def make_trainer(config, task, student, teacher=None):
    method = METHODS["dkd"](task, config["hyperparameter"])
    method.prepare(student)
    optimizer = build_optimizer(config, method, student)
    scheduler = build_scheduler(config, optimizer, 10)
    return Trainer(
        config,
        SINGLE,
        data=Data(task),
        method=method,
        student=student.train(),
        teacher=teacher,
        optimizer=optimizer,
        scheduler=scheduler,
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


def run_steps(trainer, golden, step, terms):
    """The three iterations: rows as the golden file has them, and gradients of the first."""
    rows, grads = [], {}
    for i in range(3):
        lrs = [group["lr"] for group in trainer.optimizer.param_groups]
        if step == 0:
            torch.manual_seed(100 + i)
        values = trainer.train_step(
            torch.from_numpy(golden[f"step{step}_image{i}"]),
            torch.from_numpy(golden[f"step{step}_label{i}"]),
        )
        rows.append([values[name].item() for name in ("loss", *terms)] + lrs)
        if i == 0:
            named = dict(trainer.student.named_parameters())
            grads = {
                "cls1": named["cls.1.weight"].grad[:, :8, 0, 0].clone(),
                "conv1": named["backbone.conv1.weight"].grad[:4].clone(),
            }
            if step:
                grads["cls2"] = named["cls.2.weight"].grad[:, :8, 0, 0].clone()
    return np.array(rows), grads


def check(golden, step, rows, grads, student):
    np.testing.assert_allclose(rows, golden[f"step{step}_rows"], rtol=1e-4, atol=1e-9)
    for name, grad in grads.items():
        expected = golden[f"step{step}_grad_{name}"]
        error = np.abs(grad.numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-3, (name, error)
    own = dict(student.named_parameters()) | dict(student.named_buffers())
    names = golden[f"step{step}_param_names"].tolist()
    assert len(names) > 500
    sums = np.array(
        [[own[n].double().sum().item(), own[n].double().abs().sum().item()] for n in names]
    )
    expected = golden[f"step{step}_param_sums"]
    # A sum of values of both signs is only as exact as the values that cancel in it.
    scale = expected[:, 1:]
    assert (np.abs(sums - expected) / scale).max() < 1e-4


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(DATA / "trajectory.npz", allow_pickle=False))


def test_trajectory(golden):
    names = tuple(f"class{i}" for i in range(21))
    steps = (tuple(range(1, 16)), tuple(range(16, 21)))
    task = Task("voc", "15-5", "overlap", 0, steps, names)
    config = make_config(0, "PolyLR", pos_weight=2, lr=1e-3)
    model = build_model(config, [1, 15], backbone_pretrained=False)
    assert len(model.state_dict()) == 670
    fill_by_name(model)
    trainer = make_trainer(config, task, model)
    rows, grads = run_steps(trainer, golden, 0, ("mbce", "ac"))
    check(golden, 0, rows, grads, model)
    model.eval()
    with torch.inference_mode():
        out = model(torch.from_numpy(golden["step0_image0"]), decompose=True)
        full = torch.nn.functional.interpolate(out.logits, (65, 65), mode="bilinear")
    for got, key in (
        (full[:, :, ::16, ::16], "logits"),
        (out.pos, "pos"),
        (out.neg, "neg"),
    ):
        expected = golden[f"step0_eval_{key}"]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    bias = torch.cat([head.bias for head in model.cls[1:]]).detach().view(1, -1, 1, 1)
    torch.testing.assert_close(out.pos + out.neg + bias, out.logits[:, 1:], rtol=1e-4, atol=1e-3)

    task = Task("voc", "15-5", "overlap", 1, steps, names)
    config = make_config(1, "WarmupPolyLR", pos_weight=1, lr=1e-4)
    teacher = model.requires_grad_(False)
    student = build_model(config, [1, 15, 5], backbone_pretrained=False, dropout=False)
    load_previous_step(student, teacher.state_dict(), 2, "step 0's weights")
    trainer = make_trainer(config, task, student, teacher)
    rows, grads = run_steps(trainer, golden, 1, ("mbce", "kd", "ac", "dkd_pos", "dkd_neg"))
    check(golden, 1, rows, grads, student)
    student.eval()
    with torch.inference_mode():
        logits = student(torch.from_numpy(golden["step1_image0"])).logits
        full = torch.nn.functional.interpolate(logits, (65, 65), mode="bilinear")
        preds = trainer.method.predict(full)
    expected = golden["step1_eval_logits"]
    np.testing.assert_allclose(
        full[:, :, ::16, ::16], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )
    assert (preds.numpy() == golden["step1_eval_pred"]).mean() > 0.999
