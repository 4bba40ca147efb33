"""The switches of the config block `fast`: each has its effect, and none changes the arithmetic."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from base.task import Task
from models.folding import FoldedConv2d, fold_for_inference, fold_for_training
from tests.helpers import PROJECT, train
from tests.networks import HEADS, SWITCHES, make_trainer, network, switched
from trainer.build import apply_fast
from trainer.evaluation import Evaluation
from trainer.optim import OPTIMIZERS
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.errors import UserError
from utils.metric import ConfusionMatrix

TASK = Task("voc", "own", "overlap", 1, ((1, 2, 3), (4, 5)), tuple(f"class{i}" for i in range(6)))


def relative(a, b):
    """Largest deviation over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --------------------------------------------------------------------------------------- folding
@pytest.mark.parametrize("backbone", ["tiny", pytest.param("resnet50", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_folded_model_is_the_same_function(backbone, dtype, most):
    """Logits and gradients; nothing but BatchNorm is left out of training."""
    plain = network(backbone=backbone, dtype=dtype)
    folded, fused = deepcopy(plain), deepcopy(plain)
    fold_for_training(folded)
    fold_for_inference(fused)
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    outs = [model(images, {"pos_neg"})[:3] for model in (plain, folded, fused)]
    for expected, got, same in zip(*outs, strict=True):
        assert relative(got, expected) < most
        assert torch.equal(same, got), "what is evaluated is to the bit what is trained"
    for out in outs[:2]:
        sum(part.square().mean() for part in out).backward()
    trained = [name for name, p in folded.named_parameters() if p.grad is not None]
    assert trained == [name for name, p in plain.named_parameters() if p.requires_grad]
    for name in trained:
        got, expected = (model.get_parameter(name).grad for model in (folded, plain))
        assert relative(got, expected) < 10 * most, name


def test_folding_keeps_what_is_saved():
    plain = network()
    folded = deepcopy(plain)
    fold_for_training(folded)
    before, after = plain.state_dict(), folded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in folded.named_parameters()]


def test_loaded_weights_are_folded_anew():
    """Also in a copy: a resumed checkpoint decides, not what was there before."""
    first = network()
    fold_for_training(first)
    images = torch.randn(2, 3, 64, 64)
    before = first(images).logits
    copy, other = deepcopy(first), network()
    for name, value in other.state_dict().items():
        if name.endswith("running_var"):
            value.mul_(3)
    copy.load_state_dict(other.state_dict())
    assert relative(copy(images).logits, other(images).logits) < 1e-5
    assert torch.equal(first(images).logits, before)


def test_folded_features_are_not_kept_for_the_backward_pass():
    """The convolution's output need not outlive the BatchNorm that it no longer meets."""

    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel() * (tensor.ndim == 4)) or tensor,
            lambda tensor: tensor,
        ):
            model(torch.randn(1, 3, 256, 256))
        return sum(sizes)

    plain = network()
    folded = deepcopy(plain)
    fold_for_training(folded)
    assert kept(folded) < 0.8 * kept(plain)


def test_trained_batchnorm_is_not_folded():
    student = network(freeze_all_bn=False)
    teacher = network(HEADS.previous(), freeze_all_bn=False).eval().requires_grad_(False)
    expected = teacher(torch.ones(1, 3, 64, 64)).logits
    apply_fast(switched(fold_bn=True), student, teacher, trains=True)
    assert not any(isinstance(module, FoldedConv2d) for module in student.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert relative(teacher(torch.ones(1, 3, 64, 64)).logits, expected) < 1e-5


def test_batchnorm_that_follows_no_convolution_is_refused():
    model = network()
    model.aspp.last_conv = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    with pytest.raises(AssertionError, match="follow"):
        fold_for_training(model)


# ----------------------------------------------------------------------------------- every switch
def three_steps(config, dtype):
    """Losses, gradients and parameters of three iterations of step 1."""
    teacher = network(HEADS.previous(), dtype=dtype).eval().requires_grad_(False)
    trainer = make_trainer(config, TASK, network(dtype=dtype), teacher)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        images = torch.randn(2, 3, 64, 64, generator=random).to(dtype)
        labels = torch.randint(0, 6, (2, 64, 64), generator=random).to(torch.uint8)
        terms = trainer.train_step([(images, labels)]).values()
        losses.append(torch.stack(list(terms.values())))
        gradients = {n: p.grad for n, p in trainer.student.named_parameters() if p.requires_grad}
    return trainer, torch.stack(losses), gradients


@pytest.mark.parametrize("switch", [*SWITCHES, "all"])
@pytest.mark.parametrize(
    ("dtype", "most", "of_gradients"),
    [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-12, 1e-11)],
    ids=["32", "64"],
)
def test_three_steps_are_the_same(switch, dtype, most, of_gradients):
    on = SWITCHES if switch == "all" else [switch]
    expected, losses, gradients = three_steps(switched(), dtype)
    trainer, fast_losses, fast_gradients = three_steps(switched(**dict.fromkeys(on, True)), dtype)
    torch.testing.assert_close(fast_losses, losses, rtol=most, atol=0)
    for name, gradient in gradients.items():
        assert relative(fast_gradients[name], gradient) < of_gradients, name
        got, parameter = (t.student.get_parameter(name) for t in (trainer, expected))
        assert relative(got, parameter) < most, name


@pytest.mark.parametrize("trains", [True, False])
def test_channels_last(trains):
    student, teacher = network(), network(HEADS.previous()).eval()
    layouts = []
    for model in (student, teacher):
        model.aspp.last_conv[0].register_forward_hook(lambda *a: layouts.append(a[2].stride(1)))
        model(torch.randn(1, 3, 64, 64))
    apply_fast(switched(channels_last=True), student, teacher, trains=trains)
    student(torch.randn(1, 3, 64, 64))
    teacher(torch.randn(1, 3, 64, 64))
    assert layouts == [16, 16, 1, 1]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("wants", [{"pos_neg"}, ()])
def test_gradients_lie_as_their_parameters(on, wants):
    """Else every exchange between processes rearranges them, and PyTorch warns about it."""
    model = network()
    apply_fast(switched(**dict.fromkeys(SWITCHES, on)), model, trains=True)
    outputs = model(torch.randn(2, 3, 64, 64), wants)
    sum(part.square().mean() for part in outputs if part is not None).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.stride() == parameter.stride(), name


def test_dropout_does_not_depend_on_the_layout():
    """Step 0 trains with it: the same seed has to drop the same values."""
    plain = network(dtype=torch.float64)
    plain.dropout = True
    plain.train()
    other = deepcopy(plain)
    other.channels_last()
    images = torch.randn(2, 3, 64, 64).double()
    logits = []
    for model in (plain, plain, other):
        torch.manual_seed(5)
        logits.append(model(images).logits)
    assert torch.equal(logits[0], logits[1])
    assert relative(logits[2], logits[0]) < 1e-12
    assert relative(plain(images).logits, logits[0]) > 1e-3


def optimizer_of(config, model):
    trainer = make_trainer(config, TASK, model, network(HEADS.previous()).eval())
    return trainer.optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, None])
def test_fused_update_whatever_the_checkpoint_says(fused, optimizer):
    """A checkpoint brings the options of the optimizer that wrote it."""
    here = optimizer_of(switched(optimizer=optimizer, fused_optimizer=bool(fused)), network())
    there = optimizer_of(switched(optimizer=optimizer, fused_optimizer=not fused), network())
    assert {group["fused"] for group in here.param_groups} == {fused}
    here.load_state_dict(deepcopy(there.state_dict()))
    assert {group["fused"] for group in here.param_groups} == {fused}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fast", [True, False])
def test_checkpoint_of_the_other_way_continues(fast, optimizer):
    """Also its averages, which lie in memory as the weights did where they were written."""
    way, other = (
        switched(optimizer=optimizer, **dict.fromkeys(SWITCHES, on)) for on in (fast, not fast)
    )
    there, _, _ = three_steps(other, torch.float64)
    here, _, _ = three_steps(way, torch.float64)
    state = deepcopy(there.state())
    here.student.load_state_dict(state["state_dict"])
    here.optimizer.load_state_dict(state["optimizer"])
    images = torch.randn(2, 3, 64, 64).double()
    labels = torch.randint(0, 6, (2, 64, 64)).to(torch.uint8)
    for trainer in (here, there):
        trainer.train_step([(images, labels)])
    for name, parameter in there.student.named_parameters():
        assert relative(here.student.get_parameter(name), parameter) < 1e-12, name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, False])
def test_update_that_the_loss_scale_skips(fused, name):
    """The first one often is: it must leave weights and averages alone."""
    model = network()
    optimizer = optimizer_of(switched(optimizer=name, fused_optimizer=fused), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = model.cls[2].weight
    start, lr = weight.detach().clone(), optimizer.param_groups[3]["lr"]
    for value in (torch.inf, 2.0):
        optimizer.zero_grad()
        scaler.scale((weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if value == torch.inf:
            assert torch.equal(weight, start)
    first = {  # Nesterov's first update, and Adam's, which goes by the sign alone
        "SGD": start - lr * 1.9 * (2 + 1e-4 * start),
        "AdamW": start * (1 - lr * 1e-4) - lr,
    }
    torch.testing.assert_close(weight, first[name])


def test_compile(monkeypatch):
    """Student and teacher go through the compiler when they are called, and say the same."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: in_place(module, backend=backend))
    config = switched(compile=True, fold_bn=True)
    expected, losses, _ = three_steps(switched(), torch.float64)
    assert not compiled
    trainer, fast_losses, _ = three_steps(config, torch.float64)
    assert len(compiled) >= 2
    torch.testing.assert_close(fast_losses, losses, rtol=1e-9, atol=0)
    assert list(trainer.student.state_dict()) == list(expected.student.state_dict())


def test_compile_without_a_compiler_is_refused_at_once(toy_config, monkeypatch):
    tree = json.loads(toy_config.read_text())
    toy_config.write_text(json.dumps(tree | {"fast": {"compile": True}}))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"fast\.compile needs a C\+\+ compiler"):
        train(toy_config)


# ------------------------------------------------------------------------------------- whole runs
def test_runs_use_the_switches(toy_config):
    """Visible in what they save; names and, up to rounding, values are those of the plain run."""
    tree = json.loads(toy_config.read_text())
    runs = Path(train(toy_config, "--epochs", "1")["trainer"]["save_dir"])
    states = []
    for name, fast in (("fast", {}), ("plain", dict.fromkeys(SWITCHES, False))):
        folder = shutil.copytree(runs, runs.with_name(name))
        toy_config.write_text(json.dumps(tree | {"fast": fast}))
        flags = ("--task_step", "1", "--freeze_bn", "--lr", "1e-4", "--save_dir", str(folder))
        parsed = train(toy_config, *flags)
        states.append(files.load(parsed.step_dir() / "checkpoint-epoch2.pth"))
    fast, plain = states
    assert [state["optimizer"]["param_groups"][0]["fused"] for state in states] == [True, None]
    weight = "backbone.conv1.weight"
    assert [state["state_dict"][weight].stride(1) for state in states] == [1, 49]
    assert list(fast["state_dict"]) == list(plain["state_dict"])
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(fast["state_dict"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "None"),
    ],
)
def test_how_threads_wait(given, policy, spins):
    """Decided before torch is imported, unless the user has."""
    code = (
        "import os; before = {**os.environ}\n"
        "from utils.processes import threads\n"
        "assert before == {**os.environ}, 'an import changes nothing'\n"
        "threads.spin_briefly()\n"
        "print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    )
    environment = {"PATH": os.environ["PATH"], **given}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [policy, spins], done.stderr


# --------------------------------------------------------------------------------------- counting
@pytest.mark.parametrize("classes", [2, 21, 151])
def test_confusion_counts_every_pixel(classes):
    labels = torch.randint(0, classes + 1, (3, 40, 50)).to(torch.uint8)
    labels[labels == classes] = 255
    preds = torch.randint(0, classes, (3, 40, 50))
    confusion = ConfusionMatrix(classes, classes, torch.device("cpu"))
    for image in range(3):
        confusion.update(labels[image : image + 1], preds[image : image + 1])
    cells = (labels.long() * classes + preds)[labels != 255]
    expected = torch.bincount(cells, minlength=classes**2).view(classes, classes)
    assert (confusion.matrix() == expected.numpy()).all()


def test_convolutions_are_tuned_where_images_have_fixed_size(toy_config, monkeypatch):
    """In training, validation and test, each as its own images are."""
    tree = json.loads(toy_config.read_text())
    test = tree["data_loader"]["args"]["test"]
    test["args"]["transform"], test["batch_size"] = False, 1
    toy_config.write_text(json.dumps(tree))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = {}
    for owner, name in ((Trainer, "train_step"), (Evaluation, "evaluate")):
        method = getattr(owner, name)

        def watched(self, *args, name=name, method=method, **kwargs):
            result = method(self, *args, **kwargs)
            seen[args[-1] if name == "evaluate" else "train"] = torch.backends.cudnn.benchmark
            return result

        monkeypatch.setattr(owner, name, watched)
    train(toy_config, "--epochs", "1")
    assert seen == {"train": True, "val": True, "test": False}
