"""Mixed precision, the loss scale, clipped gradients, exact products, placement: without a GPU.

On the CPU autocast runs in bfloat16, and in float16 with a loss scale, the lines that a GPU runs.
Under `FakeTensorMode` tensors are on `cuda` without one: what is made on the wrong device fails.
"""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from base.base_model import HeadPlan, ModelOutput
from base.batch import Batch
from base.task import Task
from data_loader import transforms
from data_loader.dataset import Sample
from models import aspp
from models.fast.mean import PixelMean
from models.model import DeepLabV3
from models.pixels import exact_products
from tests.helpers import PUBLISHED, train
from tests.networks import earlier_of, make_config, make_trainer
from trainer.build import build_model
from trainer.loss_meter import MOST_SKIPPED, LossMeter, Update
from trainer.methods import METHODS
from trainer.precision import Precision
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.logger import log
from utils.metric import ConfusionMatrix

# Rounding weighs more in Local POD's squares, in L_pm, where a pixel may change its class, and in
# the one channel of DKD's auxiliary head, where processors differ.
COARSE = {"pod_logits": 2, "match": 5, "ac": 2}
HALVES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16]
)


def at_step(step: int) -> Task:
    return Task("voc", "own", "overlap", step, ((1, 2, 3), (4, 5)), tuple("012345"))


def trainer_of(method: str, step: int = 1, **changes: object) -> Trainer:
    """A trainer of a tiny network, the same for the same arguments."""
    torch.manual_seed(3)
    config = make_config(step, "PolyLR", method=method, lr=1e-4)
    config._tree["trainer"] |= changes
    config = type(config)(config.flat())
    task = at_step(step)
    contract = METHODS[method](task, config["hyperparameter"])

    def network(heads: HeadPlan) -> torch.nn.Module:
        return build_model(config, heads, backbone="tiny", backbone_pretrained=False, dropout=False)

    student = network(contract.heads())
    teacher = None
    if contract.needs_teacher:
        teacher = network(contract.heads().previous()).requires_grad_(False).eval()
    return make_trainer(config, task, student, teacher, method=method)


def in_half(dtype: torch.dtype) -> Precision:
    """On the CPU; the loss scale starts where the tiny network's gradients do not overflow."""
    precision = Precision("cpu", dtype)
    if precision.scaled:
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return precision


def batches(count: int = 3, channels: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(count, 4, 3, 64, 64, generator=generator)
    labels = torch.randint(0, channels, (count, 4, 64, 64), generator=generator).to(torch.uint8)
    labels[:, :, :5] = 255
    return list(zip(images, labels, strict=True))


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    return [value.clone() for value in trainer.student.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# -------------------------------------------------------------------------------- half precision
@HALVES
@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("method", PUBLISHED)
def test_half_precision_follows_float32(method, step, dtype):
    """Three iterations of every method: each loss to what the digits of the type allow."""
    exact, half = trainer_of(method, step), trainer_of(method, step)
    if method == "plop":
        for trainer in (exact, half):
            trainer.method.thresholds.fill_(torch.inf)  # every answer of the teacher is sure
    half.precision = in_half(dtype)
    seen = []
    forward = half.student.forward
    half.student.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]
    for images, labels in batches(channels=1 + len(exact.task.seen)):
        batch = Batch(images, labels, saliency=labels % 2)
        expected, found = exact.train_step([batch]), half.train_step([batch])
        if dtype is torch.float16:
            assert found.skipped == 0
        expected, found = expected.values(), found.values()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32, name
            bound = 8e-3 if dtype is torch.bfloat16 else 1e-3  # three bits fewer
            bound *= COARSE.get(name, 1)
            torch.testing.assert_close(found[name], value, rtol=bound, atol=1e-4, msg=name)
    assert {out.logits.dtype for out in seen} == {dtype}, "the networks computed in it"
    assert half.precision.scaled is (dtype is torch.float16)


def test_evaluation_is_float32_unless_asked(monkeypatch):
    """Published figures are; `eval_amp` may choose otherwise, and both are named."""
    evaluation = trainer_of("dkd").evaluation
    evaluation.precision = Precision("cpu", torch.bfloat16)
    evaluation.data.fixed_size = lambda kind: True
    ((images, labels),) = batches(1)
    loader = [Sample(images.to(torch.uint8), labels, list("0123"))]
    seen = []
    predict = evaluation.method.predict
    monkeypatch.setattr(
        evaluation.method,
        "predict",
        lambda out, size: seen.append(out.logits.dtype) or predict(out, size),
    )
    evaluation.evaluate(loader, "test")
    evaluation.config._tree["eval_amp"] = True
    evaluation.config = type(evaluation.config)(evaluation.config.flat())
    evaluation.evaluate(loader, "test")
    assert seen == [torch.float32, torch.bfloat16]
    assert [evaluation.precision.name(on) for on in (False, True)] == ["float32", "bfloat16"]


def test_reports_name_the_precision(toy_config):
    parsed = train(toy_config, "--epochs", "1")
    assert json.loads((parsed.log_dir() / "metrics.json").read_text())["precision"] == "float32"
    text = (parsed.log_dir() / "info.log").read_text()
    assert re.search(r"test, step 0, \d+ images, float32:", text)


# ------------------------------------------------------------------------------ skipped updates
@pytest.fixture
def logged(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_overflow_is_a_skipped_update(fault, accumulate, logged):
    """Weights and momentum stay, the scale falls, the schedule goes on, and the log tells it."""
    trainer = trainer_of("dkd")
    trainer.precision = in_half(torch.float16)
    good = batches(3)
    losses = LossMeter(1)
    losses.begin("step 1, epoch 1")
    losses.add(1, trainer.train_step([good[0]]), ["a"])
    before, scale = weights_of(trainer), trainer.precision.scaler.get_scale()
    momentum = [s["momentum_buffer"].clone() for s in trainer.optimizer.state.values()]
    if fault == "gradient":
        trainer.precision.scaler.update(2.0**60)  # far beyond what float16 holds
    else:
        # The gradients of a loss that is not finite may be finite: these are.
        plain = trainer.method.losses
        trainer.method.losses = lambda *args: {"mbce": plain(*args)["mbce"] + torch.inf}
    bad = trainer.train_step([good[1]] * accumulate, accumulate)
    vars(trainer.method).pop("losses", None)
    assert bad.skipped == 1
    assert bad.loss.isfinite() == (fault == "gradient")
    losses.add(2, bad, ["b"])
    assert same(weights_of(trainer), before)
    state = trainer.optimizer.state.values()
    assert same([s["momentum_buffer"] for s in state], momentum)
    assert trainer.precision.scaler.get_scale() == (2.0**59 if fault == "gradient" else scale / 2)
    assert trainer.scheduler.last_epoch == 2
    assert (losses.count, losses.skipped, losses.in_a_row) == (1, 1, 1)
    told = logged.messages[-1]
    assert "not finite at step 1, epoch 1, iteration 2, so the update is skipped" in told
    assert ("images of the batch: b" in told) is (fault == "loss")
    trainer.precision.scaler.update(scale)
    losses.add(3, trainer.train_step([good[2]]), ["c"])
    assert (losses.count, losses.skipped, losses.in_a_row) == (2, 1, 0)
    assert not same(weights_of(trainer), before)
    assert all(map(torch.isfinite, map(torch.tensor, losses.means().values())))
    assert "skipped" not in losses.means()


def test_a_row_of_skipped_updates_ends_the_run():
    """Across epochs; one good update starts the count anew."""
    losses = LossMeter(2)
    bad = Update(torch.tensor(torch.nan), {}, skipped=torch.tensor(1.0))
    good = Update(torch.tensor(1.0), {}, skipped=torch.tensor(0.0))
    losses.begin("step 1, epoch 1")
    for number in range(MOST_SKIPPED - 1):
        losses.add(number, bad, ["a"])
    losses.add(100, good, ["b"])
    losses.begin("step 1, epoch 2")
    for number in range(MOST_SKIPPED - 1):
        losses.add(number, bad, ["a"])
    losses.read()
    losses.begin("step 1, epoch 3")
    losses.add(1, bad, ["c"])
    with pytest.raises(UserError) as caught:
        losses.read()
    for part in (
        f"not finite at step 1, epoch 3, iteration 1, the last of {MOST_SKIPPED} in a row",
        "loss nan",
        "images of the batch: c",
        "trainer.clip_grad_norm",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("every", [1, 2, 10])
def test_the_loss_of_an_epoch_is_the_mean_over_its_updates(every):
    """However often it is read, and without those that were skipped."""
    losses = LossMeter(every)
    for epoch in (1, 2):
        losses.begin(f"step 0, epoch {epoch}")
        for number, value in enumerate((1.0, 2.0, 30.0, 6.0, 1.0), start=1):
            skipped = torch.tensor(float(number == 3))
            losses.add(number, Update(epoch * torch.tensor(value), {}, skipped=skipped), ["a"])
        losses.read()
        assert losses.means() == {"loss": epoch * 2.5}
        assert (losses.count, losses.skipped) == (4, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_an_iteration_tells_the_weighted_sum_and_the_mean_of_each_term(count):
    """Of its batches together."""
    trainer = trainer_of("dkd", 1)
    weights = {"mbce": 1, "ac": 1, "kd": 5, "dkd_pos": 5, "dkd_neg": 5}
    classes = {"mbce": 2, "ac": 1, "kd": 3, "dkd_pos": 3, "dkd_neg": 3}
    batches = [
        (torch.randn(2, 3, 64, 64), torch.randint(0, 6, (2, 64, 64)).to(torch.uint8))
        for _ in range(count)
    ]
    each = []
    for images, labels in batches:
        with torch.no_grad():
            outputs = (
                net(images, trainer.method.wants) for net in (trainer.student, trainer.teacher)
            )
            each.append(trainer.method.losses(Batch(images, labels), *outputs, torch.clone))
    told = trainer.train_step(batches, count).values()
    assert told.keys() == {"loss"} | weights.keys()
    for name in weights:
        expected = sum(terms[name].sum() for terms in each) / classes[name] / count
        torch.testing.assert_close(told[name], expected, rtol=1e-4, atol=0)
    loss = sum(weights[name] * classes[name] * told[name] for name in weights)
    torch.testing.assert_close(told["loss"], loss, rtol=1e-5, atol=0)


def test_a_batch_knows_its_iteration():
    """The same for all that are accumulated, and counted on after a resume."""
    trainer, seen = trainer_of("finetune", 0), []
    losses = trainer.method.losses
    trainer.method.losses = lambda batch, *rest: (
        seen.append(batch.iteration),
        losses(batch, *rest),
    )[1]
    batch = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    trainer.train_step([batch, batch], 2)
    trainer.train_step([batch])
    trainer.scheduler.load_state_dict({"last_epoch": 7})
    trainer.train_step([batch])
    assert seen == [0, 0, 1, 7]


def test_a_run_with_skipped_updates(toy_config, monkeypatch):
    """The whole way: an overflow in the middle of a run costs one update and nothing else."""
    monkeypatch.setattr(
        Precision, "of", classmethod(lambda cls, config, device: in_half(torch.float16))
    )
    step = Precision.step
    calls = []

    def overflow_once(self, optimizer, clip=None):
        calls.append(1)
        if len(calls) == 3:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        return step(self, optimizer, clip)

    monkeypatch.setattr(Precision, "step", overflow_once)
    parsed = train(toy_config, "--epochs", "1")
    text = (parsed.log_dir() / "info.log").read_text()
    assert "gradients in float16 are not finite at step 0, epoch 1, iteration 3" in text
    assert ", 1 updates skipped, " in text
    checkpoint = torch.load(parsed.step_dir() / "last.pth", weights_only=True)
    assert checkpoint["scaler"]["scale"] == 2.0**7
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_without_a_loss_scale_the_first_one_ends_the_run(toy_config, monkeypatch):
    monkeypatch.setattr(
        Precision, "of", classmethod(lambda cls, config, device: cls("cpu", torch.bfloat16))
    )
    with pytest.raises(UserError, match="the loss is not finite at step 0, epoch 1, iteration"):
        train(toy_config, "--lr", "1e30")


# ----------------------------------------------------------------------------- clipped gradients
def gradient_norm(trainer: Trainer) -> torch.Tensor:
    grads = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    return torch.stack([g.double().norm() for g in grads]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipped_gradients(accumulate, dtype):
    """The norm of the whole iteration's gradient, without the loss scale in it."""
    free, clipped = trainer_of("dkd"), trainer_of("dkd", clip_grad_norm=0.01)
    loose = trainer_of("dkd", clip_grad_norm=1e9)
    for trainer in (clipped, loose, free):
        trainer.precision = in_half(dtype)
    parts = batches(accumulate)
    told = clipped.train_step(parts, accumulate)
    free_told, loose_told = (t.train_step(parts, accumulate) for t in (free, loose))
    assert free_told.grad_norm is None
    assert told.grad_norm > 1, "the network's own gradient is longer"
    torch.testing.assert_close(told.grad_norm, loose_told.grad_norm)
    torch.testing.assert_close(
        gradient_norm(clipped).float(), torch.tensor(0.01), rtol=1e-4, atol=0
    )
    if dtype is torch.float32:
        assert same(weights_of(free), weights_of(loose))
        torch.testing.assert_close(gradient_norm(free).float(), told.grad_norm)


def test_clipping_saves_a_run_that_explodes(toy_config):
    tree = json.loads(toy_config.read_text())
    lr = ("--lr", "0.5", "--epochs", "1")
    with pytest.raises(UserError, match=r"set trainer\.clip_grad_norm"):
        train(toy_config, "--name", "free", "--lr", "1e30")
    tree["trainer"]["clip_grad_norm"] = 1e-3
    toy_config.write_text(json.dumps(tree))
    parsed = train(toy_config, "--name", "clipped", *lr)
    assert ", grad_norm " in (parsed.log_dir() / "info.log").read_text()


# -------------------------------------------------------------------------------- exact products
PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def short_products():
    """What a user may set for speed; the flags are as before afterwards."""
    before = [backend.fp32_precision for backend in PRODUCTS]
    torch.set_float32_matmul_precision("medium")
    yield [backend.fp32_precision for backend in PRODUCTS]
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(PRODUCTS, before, strict=True):
        backend.fp32_precision = precision


def test_losses_keep_float32(short_products, monkeypatch):
    """Around every product of the losses the flags ask for all digits; the user's come back."""
    assert "ieee" not in short_products
    seen = []

    def watch(name: str) -> None:
        product = getattr(torch, name)

        def watched(*args, **kwargs):
            seen.append([backend.fp32_precision for backend in PRODUCTS])
            return product(*args, **kwargs)

        monkeypatch.setattr(torch, name, watched)

    watch("bmm")
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 64, 64)).to(torch.uint8)
    out = ModelOutput(logits, backbone_features=torch.rand(2, 5, 4, 4), unknown=logits[:, :1])
    for method in METHODS.values():
        contract = method(Task("voc", "own", "overlap", 0, ((1, 2),), tuple("012")), {})
        terms = contract.losses(Batch(None, labels, saliency=labels), out, None, torch.clone)
        sum(term.sum() for term in terms.values()).backward()
    assert len(seen) > 4
    assert all(flags == ["ieee", "ieee"] for flags in seen)
    assert [backend.fp32_precision for backend in PRODUCTS] == short_products


def test_flags_come_back_after_an_error(short_products):
    with pytest.raises(ValueError, match="inside"), exact_products():
        raise ValueError("inside")
    assert [backend.fp32_precision for backend in PRODUCTS] == short_products


def test_the_pooled_branch_is_enlarged_in_full_precision(monkeypatch):
    """Its backward pass adds up a whole map of gradients, in the type of its input on CUDA."""
    seen = []

    def watched(pooled, **how):
        seen.append(pooled.dtype)
        return interpolate(pooled, **how)

    interpolate = aspp.F.interpolate
    monkeypatch.setattr(aspp.F, "interpolate", watched)
    module = aspp.ASPP(8, 4, 16, last_conv=False).eval()
    with torch.autocast("cpu", torch.bfloat16):
        module.project[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
        module(torch.rand(1, 8, 6, 6))
    assert seen == [torch.float32, torch.bfloat16], "what follows is as before in half precision"


def test_reports_tell_of_tf32():
    assert Precision("cpu", torch.float32).name() == "float32"
    whole, half = (Precision("cuda", dtype) for dtype in (torch.float32, torch.bfloat16))
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        for allowed, words in (("tf32", "float32, TF32 allowed"), ("ieee", "float32")):
            convolutions.fp32_precision = allowed
            assert whole.name() == half.name(on=False) == words
            assert half.name() == "bfloat16"
    finally:
        convolutions.fp32_precision = before


# ------------------------------------------------------------------------------------- placement
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("method", PUBLISHED)
def test_everything_is_made_on_the_device_of_the_images(method, step, monkeypatch):
    """Forward, losses with the gradients they form, prediction and counting, on pretended CUDA."""
    formed = []

    forward = PixelMean.forward

    def watched(ctx, *args):
        loss = forward(ctx, *args)
        formed.append((loss.device.type, ctx.to_save[0].device.type))
        return loss

    monkeypatch.setattr(PixelMean, "forward", staticmethod(watched))
    device, task = torch.device("cuda", 0), at_step(step)
    imagenet = transforms._imagenet_statistics
    monkeypatch.setattr(transforms, "_imagenet_statistics", imagenet.__wrapped__)  # no fake is kept
    with FakeTensorMode():
        contract = METHODS[method](task, {})
        earlier = {name: value.cpu() for name, value in earlier_of(method, task).items()}
        with device:  # the networks only: what follows must choose for itself
            plan = contract.heads()
            student = DeepLabV3(plan, backbone="tiny")
            contract.start(student, earlier)
            models = [student]
            if contract.needs_teacher:
                models.append(DeepLabV3(plan.previous(), backbone="tiny"))
        images = transforms.normalize(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
        labels = torch.zeros(2, 64, 64, dtype=torch.uint8, device=device)
        outputs = [model(images, contract.wants) for model in models]
        batch = Batch(images, labels, saliency=labels)
        teacher = (*outputs, None)[1]
        terms = contract.losses(batch, outputs[0], teacher, torch.clone)
        for name, term in terms.items():
            assert (term.device.type, term.dtype) == ("cuda", torch.float32), name
        confusion = ConfusionMatrix(6, 6, device)
        preds = contract.predict(outputs[0], (64, 64))
        assert (preds.device.type, preds.dtype) == ("cuda", torch.int64)
        confusion.update(labels, preds)
        assert confusion.cells.device.type == "cuda"
        assert {value.device.type for value in contract.state().values()} <= {"cpu"}
    assert formed
    assert set(formed) == {("cuda", "cuda")}
