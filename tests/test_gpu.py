"""What only a CUDA device can show: mixed precision, the NCCL group, agreement with the CPU."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch

from base.task import Task
from models.model import DeepLabV3
from tests.helpers import dkd_heads, train
from tests.losses import TERMS, both, chunked, make
from tests.networks import make_config, make_trainer
from utils import checkpoint as files
from utils.distributed import Ranks
from utils.metric import ConfusionMatrix
from utils.parse_config import ConfigParser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def confusion(parsed):
    return np.array(json.loads((parsed.log_dir() / "metrics.json").read_text())["confusion"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(toy_config, dtype):
    tree = json.loads(toy_config.read_text()) | {"amp_dtype": dtype}
    toy_config.write_text(json.dumps(tree))
    train(toy_config, "-d", "0")
    parsed = train(toy_config, "-d", "0", "--task_step", "1", "--freeze_bn", "--lr", "1e-4")
    checkpoint = files.load(parsed.step_dir() / "checkpoint-epoch2.pth")
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())
    assert bool(checkpoint["scaler"]) is (dtype == "float16")


def test_one_process_per_gpu(toy_config):
    """The NCCL group; SyncBN and DDP take part where there are several GPUs."""
    parsed = train(toy_config, "--multiprocessing_distributed")
    assert confusion(parsed).sum() > 0


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("small", "size"), [((32, 32), (512, 512)), ((5, 7), (67, 109))])
def test_losses_equal_float64(term, dtype, small, size):
    device = torch.device("cuda", 0)
    logits, teacher, labels, *rest = make(small, size, classes=19, dtype=dtype)
    logits, teacher, labels = (x.detach().to(device) for x in (logits, teacher, labels))
    exact, found = (
        both(chunked, term, logits.to(kind).requires_grad_(), teacher.to(kind), labels, *rest)
        for kind in (torch.float64, dtype)
    )
    # The loss stays float32, the gradient is rounded to the logits' type.
    for expected, got, most in zip(exact, found, (0, torch.finfo(dtype).eps), strict=True):
        bound = max(1e-6, most) * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected.double(), rtol=2e-6, atol=bound)


def test_the_host_never_waits():
    """Iterations, with a loss scale, and the counting of an evaluation: all of it is queued."""
    device = torch.device("cuda", 0)
    task = Task("voc", "own", "overlap", 1, ((1, 2, 3), (4, 5)), tuple("012345"))
    plan = dkd_heads(1, 3, 2)
    student = DeepLabV3(plan, backbone="tiny", freeze_all_bn=True, dropout=False).to(device)
    teacher = DeepLabV3(plan.previous(), backbone="tiny").to(device).eval().requires_grad_(False)
    config = make_config(1, "PolyLR", lr=1e-4)
    trainer = make_trainer(config, task, student, teacher, Ranks(0, 1, device))
    images = torch.randn(2, 3, 64, 64, device=device)
    labels = torch.randint(0, 6, (2, 64, 64), device=device).to(torch.uint8)
    confusion = ConfusionMatrix(6, device)

    def iteration():
        trainer.train_step([(images, labels)])
        with torch.inference_mode():
            confusion.update(labels, trainer.method.predict(student(images), (64, 64)))

    iteration()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_counts_where_it_computes(fused):
    """Fused on the device, else on the CPU; also after a checkpoint of the other way."""
    device = torch.device("cuda", 0)
    task = Task("voc", "own", "overlap", 1, ((1, 2, 3), (4, 5)), tuple("012345"))
    batch = torch.randn(2, 3, 64, 64, device=device), torch.ones(2, 64, 64, device=device).byte()

    def adamw(fused):
        student = DeepLabV3(dkd_heads(1, 3, 2), backbone="tiny", freeze_all_bn=True).to(device)
        values = make_config(1, "PolyLR", lr=1e-4, method="finetune").flat()
        del values["optimizer.args.momentum"], values["optimizer.args.nesterov"]
        values |= {"optimizer.type": "AdamW", "fast.fused_optimizer": fused, "use_amp": False}
        ranks = Ranks(0, 1, device)
        return make_trainer(ConfigParser(values), task, student, None, ranks, "finetune")

    here, there = adamw(fused), adamw(not fused)
    there.train_step([batch])
    here.optimizer.load_state_dict(deepcopy(there.optimizer.state_dict()))
    here.train_step([batch])
    steps = [state["step"] for state in here.optimizer.state.values()]
    assert {step.device.type for step in steps} == {"cuda" if fused else "cpu"}
    assert {step.item() for step in steps} == {2}


def test_evaluation_agrees_with_the_cpu(toy_config):
    tree = json.loads(toy_config.read_text()) | {"use_amp": False}
    toy_config.write_text(json.dumps(tree))
    gpu = confusion(train(toy_config, "-d", "0"))
    cpu = confusion(train(toy_config, "-d", "cpu", "--test"))
    assert np.abs(gpu - cpu).sum() <= 0.001 * cpu.sum()
