"""What only a CUDA device can show: mixed precision, the NCCL group, agreement with the CPU."""

import json

import numpy as np
import pytest
import torch

from tests.conftest import train
from utils import checkpoint as files

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


def test_evaluation_agrees_with_the_cpu(toy_config):
    tree = json.loads(toy_config.read_text()) | {"use_amp": False}
    toy_config.write_text(json.dumps(tree))
    gpu = confusion(train(toy_config, "-d", "0"))
    cpu = confusion(train(toy_config, "-d", "cpu", "--test"))
    assert np.abs(gpu - cpu).sum() <= 0.001 * cpu.sum()
