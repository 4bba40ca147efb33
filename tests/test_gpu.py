"""What only a CUDA device can show: mixed precision, the NCCL group, agreement with the CPU.

`bash scripts/test.sh -m gpu -n 0`; in every other run GPUs are hidden.
"""

import json
import os
import signal
from copy import deepcopy

import numpy as np
import pytest
import torch

from base.base_method import StepContext
from base.batch import Batch
from base.task import Task
from models.model import DeepLabV3
from models.weights import load_previous_step
from tests.helpers import NO_GPU, PUBLISHED, dkd_heads, train
from tests.losses import TERMS, both, chunked, make
from tests.networks import fill_by_name, make_config, make_trainer
from trainer.methods import METHODS
from trainer.optim import build_scheduler
from trainer.precision import Precision
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.metric import ConfusionMatrix
from utils.parse_config import ConfigParser
from utils.processes.signals import Interrupted
from utils.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
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
        smallest = most * torch.finfo(dtype).smallest_normal  # spacing of the subnormal numbers
        bound = max(1e-6, most) * expected.abs().max().item() + smallest
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
    confusion = ConfusionMatrix(6, 6, device)

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


def on_device(method, dtype, step=1, earlier=None):
    """A trainer of a tiny network on the device, in one precision; `earlier` are weights."""
    device, torch_dtype = torch.device("cuda", 0), getattr(torch, dtype)
    task = Task("voc", "own", "overlap", step, ((1, 2, 3), (4, 5)), tuple("012345"))
    plan = METHODS[method](task, {}).heads()
    student = DeepLabV3(plan, backbone="tiny", freeze_all_bn=True, dropout=False).to(device)
    teacher = DeepLabV3(plan.previous(), backbone="tiny").to(device).eval().requires_grad_(False)
    if earlier is not None:
        load_previous_step(student, earlier, 2, "step 0's weights")
        teacher.load_state_dict(earlier)
    config = make_config(step, "PolyLR", method=method, lr=1e-4)
    ranks = Ranks(0, 1, device)
    trainer = make_trainer(config, task, student, teacher if step else None, ranks, method)
    precision = Precision("cuda", torch_dtype)
    if precision.scaled:
        precision.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    trainer.precision = precision
    return trainer


def device_batches(count=2, channels=6):
    generator = torch.Generator().manual_seed(8)
    for _ in range(count):
        images = torch.randn(4, 3, 64, 64, generator=generator).cuda()
        labels = torch.randint(0, channels, (4, 64, 64), generator=generator).byte().cuda()
        labels[:, :5] = 255
        yield Batch(images, labels, saliency=labels % 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("method", PUBLISHED)
def test_iterations_of_every_method(method, step, dtype):
    """Two of them, and what each remembers: finite, kept on the host, taken over by another."""
    trainer, other = on_device(method, dtype, step), on_device(method, dtype, step)
    batches = list(device_batches(3, 1 + len(trainer.task.seen)))
    trainer.method.begin_step(context(trainer, batches))
    for batch in batches[:2]:
        update = trainer.train_step([batch])
        assert all(value.isfinite() for value in update.values().values())
        assert update.skipped is None or not update.skipped.item()
    state = trainer.method.state()
    assert {value.device.type for value in state.values()} <= {"cpu"}
    other.method.load_state(state)
    other.student.load_state_dict(trainer.student.state_dict())
    if trainer.teacher is not None:
        other.teacher.load_state_dict(trainer.teacher.state_dict())
    other.optimizer.load_state_dict(deepcopy(trainer.optimizer.state_dict()))
    other.scheduler.load_state_dict(trainer.scheduler.state_dict())
    expected, found = (each.train_step([batches[2]]).values() for each in (trainer, other))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)
    preds = trainer.method.predict(
        trainer.student(batches[0][0], trainer.method.answers_from), (64, 64)
    )
    assert preds.device.type == "cuda"
    assert 0 <= preds.min() <= preds.max() <= len(trainer.task.seen)


def blocks(channels, count=8):
    """Batches that can be learnt: blocks of a colour per channel, with noise."""
    generator = torch.Generator().manual_seed(8)
    colours = torch.randn(6, 3, generator=generator)
    for _ in range(count):
        coarse = torch.randint(0, 6, (4, 8, 8), generator=generator)
        labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
        noise = 0.5 * torch.randn(4, 3, 64, 64, generator=generator)
        images = (colours[labels].permute(0, 3, 1, 2) + noise).cuda()
        shown = torch.where(torch.isin(labels, torch.tensor(channels)), labels, 0).byte().cuda()
        yield Batch(images, shown)


def losses_of(trainer, batches, count=200):
    """Means over twenty iterations each."""
    trainer.scheduler = build_scheduler(trainer.config, trainer.optimizer, count)
    losses = torch.stack([trainer.train_step([batches[i % 8]]).loss for i in range(count)])
    return losses.view(-1, 20).mean(1).cpu()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32_over_200_iterations(dtype):
    """Step 0, then step 1 from where float32 came, to 0.5 %; on a CPU it is less than 0.1 %."""
    earlier = None
    for step, shown in ((0, [1, 2, 3]), (1, [4, 5])):
        exact, half = (on_device("dkd", kind, step, earlier) for kind in ("float32", dtype))
        if step == 0:
            fill_by_name(exact.student)
        half.student.load_state_dict(exact.student.state_dict())
        batches = list(blocks(shown))
        expected, found = (losses_of(trainer, batches) for trainer in (exact, half))
        assert expected[-1] < expected[0]
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
        earlier = exact.student.state_dict()


def context(trainer, batches):
    """What a pass before the step sees of a trainer without data."""

    def passed(epoch):
        return (batch._replace(iteration=number) for number, batch in enumerate(batches))

    return StepContext(trainer.student, trainer.teacher, passed, 1, torch.clone)


def test_thresholds_of_plop_agree_with_the_cpu():
    """The pass before the step, in float32."""
    trainer, batches = on_device("plop", "float32"), list(device_batches())
    with torch.no_grad():
        trainer.method.begin_step(context(trainer, batches))
        here = trainer.method.thresholds
        trainer.student.cpu()
        trainer.teacher.cpu()
        here_too = [b._replace(images=b.images.cpu(), labels=b.labels.cpu()) for b in batches]
        trainer.method.begin_step(context(trainer, here_too))
    assert here.device.type == "cpu"
    assert (here > 0.001).any()
    torch.testing.assert_close(here, trainer.method.thresholds, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["plop", "sdr"])
def test_a_run_with_state_is_resumed(method, toy_config, monkeypatch):
    """Stopped in step 1 on the device; its state comes back to the device."""
    tree = json.loads(toy_config.read_text())
    tree["data_loader"]["args"]["train"]["args"]["transform_args"]["crop_size"] = 64
    toy_config.write_text(json.dumps(tree))
    line = ("-d", "0", "--method", method, "--bs", "4")
    train(toy_config, *line, "--epochs", "1")
    each = Trainer.train_step

    def stop_in_the_middle(self, *args):
        values = each(self, *args)
        if self.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    step = (*line, "--task_step", "1", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_in_the_middle)
        with pytest.raises(Interrupted):
            train(toy_config, *step)
    before = files.load(toy_step(toy_config) / "last.pth")["method_state"]
    assert all(value.any() for value in before.values())
    parsed = train(toy_config, *step, "-r", "auto")
    after = files.load(parsed.step_dir() / "checkpoint-epoch1.pth")["method_state"]
    assert after.keys() == before.keys()
    assert all(value.isfinite().all() for value in after.values())
    if method == "plop":
        assert torch.equal(after["thresholds"], before["thresholds"])


def toy_step(config):
    return config.parent / "runs/models/overlap_15-5_toy/step_1"


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
