"""Methods: a training step against the formulas written out plainly, groups, forgetting, seams."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from base.base_model import ModelOutput
from base.batch import Batch
from base.task import Task
from models.heads import start_head
from models.model import DeepLabV3
from tests.helpers import PUBLISHED, dkd_heads
from tests.networks import WAYS, earlier_of, make_config, make_trainer
from trainer.build import build_model
from trainer.methods import METHODS
from trainer.optim import build_optimizer

NAMES = tuple(f"class{i}" for i in range(7))
STEPS = ((1, 2, 3), (4, 5), (6,))


def at_step(step):
    return Task("voc", "own", "overlap", step, STEPS, NAMES)


def plain_bce(logits, targets, pos_weight=1.0):
    """Binary cross-entropy of scores, as in a textbook; one value per class, [C]."""
    scores = torch.sigmoid(logits)
    loss = -(pos_weight * targets * torch.log(scores) + (1 - targets) * torch.log(1 - scores))
    return torch.stack([loss[:, c].mean() for c in range(loss.shape[1])])


def plain_step_loss(student, teacher, images, labels, task, hyperparameter):
    """The loss of a step as the paper states it, class by class, without our functions."""

    def features(model):
        return model.aspp(model.backbone(images)[0])

    def full(logits):
        return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)

    def parts(model, x, heads):
        weight = torch.cat([model.cls[k].weight for k in heads])[:, :, 0, 0]
        contributions = torch.einsum("ck,nkhw->nckhw", weight, x)
        return contributions.clamp(min=0).sum(2), contributions.clamp(max=0).sum(2)

    x, t = features(student), task.step
    new = full(student.cls[t + 1](x))
    first = 1 + len(task.old)
    one_hot = torch.stack([(labels == first + c).double() for c in range(new.shape[1])], dim=1)
    aux = full(student.cls[0](x.detach()))
    h = hyperparameter
    loss = h["mbce"] * plain_bce(new, one_hot, h["pos_weight"]).sum()
    loss = loss + h["ac"] * plain_bce(aux, torch.zeros_like(aux)).sum()
    if teacher is not None:
        old_heads = range(1, t + 1)
        with torch.no_grad():
            y = features(teacher)
            target = full(torch.cat([teacher.cls[k](y) for k in old_heads], 1)).sigmoid()
            target_pos, target_neg = (part.sigmoid() for part in parts(teacher, y, old_heads))
        old = full(torch.cat([student.cls[k](x) for k in old_heads], 1))
        pos, neg = parts(student, x, old_heads)
        loss = loss + h["kd"] * plain_bce(old, target).sum()
        loss = loss + h["dkd_pos"] * plain_bce(pos, target_pos).sum()
        loss = loss + h["dkd_neg"] * plain_bce(neg, target_neg).sum()
    return loss


def plain_sgd(groups, state, lrs):
    """One step of SGD with Nesterov momentum 0.9, written out."""
    for (params, decay), lr in zip(groups, lrs, strict=True):
        for p in params:
            if p.grad is None:
                continue
            grad = p.grad + decay * p.data
            state[p] = grad.clone() if p not in state else 0.9 * state[p] + grad
            p.data -= lr * (grad + 0.9 * state[p])


@WAYS
@pytest.mark.parametrize("step", [0, 1, 2])
def test_training_steps_equal_the_plain_formulas(step, fast):
    """Three iterations in float64: losses and every parameter to ten digits."""
    task = at_step(step)
    heads = dkd_heads(1, *task.classes_per_step)
    frozen = step > 0
    make = lambda plan: DeepLabV3(  # noqa: E731
        plan, backbone="tiny", freeze_all_bn=frozen, dropout=False
    ).double()
    ours, plain = make(heads), make(heads)
    teacher = make(heads.previous()).eval().requires_grad_(False) if step else None
    if step:
        start_head(plain.cls[-1], plain.cls[0])
    config = make_config(min(step, 1), "WarmupPolyLR", fast, pos_weight=2, lr=1e-3)
    ours.load_state_dict(plain.state_dict())
    trainer = make_trainer(config, task, ours, deepcopy(teacher))  # prepares the new head as well
    plain.train()
    decays = [1e-4, 1e-4, 1e-4] if step == 0 else [0, 0, 0, 1e-4]
    modules = [[plain.backbone], [plain.aspp], [*plain.cls]]
    if step:
        modules[2:] = [[*plain.cls][:-1], [plain.cls[-1]]]
    groups = [
        ([p for module in group for p in module.parameters() if p.requires_grad], decay)
        for group, decay in zip(modules, decays, strict=True)
    ]
    state = {}
    for i in range(3):
        images = torch.randn(2, 3, 64, 64).double()
        labels = torch.randint(0, 1 + len(task.seen), (2, 64, 64)).to(torch.uint8)
        labels[:, :4] = 255
        warm = 0.001 + (1 - 0.001) * i / 2  # max_iters 10, warm-up over 2
        lr = 1e-3 * (1 - i / 10) ** 0.9 * min(warm, 1)
        loss = plain_step_loss(plain, teacher, images, labels, task, config["hyperparameter"])
        plain.zero_grad()
        loss.backward()
        plain_sgd(groups, state, [lr, *[10 * lr] * (len(groups) - 1)])
        got = trainer.train_step([(images, labels)]).values()
        torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-10, atol=0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("step", [0, 1])
def test_groups_hold_every_trainable_parameter(method, step):
    task = at_step(step)
    config = make_config(step, "PolyLR", lr=1e-3, method=method)
    contract = METHODS[method](task, config["hyperparameter"])
    model = build_model(config, contract.heads(), backbone="tiny", backbone_pretrained=False)
    contract.start(model, earlier_of(method, task))
    optimizer = build_optimizer(config, contract, model)
    lrs = [group["lr"] for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    tenfold = [1e-3, *[1e-2] * (3 if step else 2)]
    if method in ("dkd", "finetune"):
        assert lrs == tenfold
        assert decays == ([0, 0, 0, 1e-4] if step else [1e-4] * 3)
    else:
        expected = {"ssul": [1e-3, 1e-3, 1e-7] if step else tenfold}  # new, unknown, background
        assert lrs == pytest.approx(expected.get(method, [1e-3] * 3))
        assert decays == [1e-4] * 3


def test_every_term_has_a_weight():
    for name in PUBLISHED:
        task = at_step(1)
        contract = METHODS[name](task, {})
        model = DeepLabV3(contract.heads(), backbone="tiny")
        out = model(torch.randn(2, 3, 64, 64), contract.wants)
        teacher = None
        if contract.needs_teacher:
            teacher = DeepLabV3(contract.heads().previous(), backbone="tiny")(
                torch.randn(2, 3, 64, 64), contract.wants
            )
        labels = torch.randint(0, 6, (2, 64, 64), dtype=torch.uint8)
        batch = Batch(None, labels, saliency=labels % 2)
        terms = contract.losses(batch, out, teacher, torch.clone)
        assert terms.keys() <= contract.weights.keys(), name
        assert all(term.ndim == 1 for term in terms.values())


def test_finetune_teaches_old_classes_to_be_background():
    task = at_step(1)
    contract = METHODS["finetune"](task, {})
    model = DeepLabV3(dkd_heads(1, 3, 2), backbone="tiny")
    contract.start(model, {})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"cls.0.weight", "cls.0.bias"}, "weight decay leaves it as well"
    out = model(torch.randn(2, 3, 64, 64))
    batch = Batch(None, torch.zeros(2, 64, 64, dtype=torch.uint8))
    terms = contract.losses(batch, out, None, None)
    assert terms["mbce"].shape == (5,)
    terms["mbce"].sum().backward()
    assert model.cls[1].weight.grad.abs().sum() > 0
    assert model.cls[0].weight.grad is None


def test_new_head_of_dkd_without_auxiliary_stays_random():
    task = at_step(1)
    model = DeepLabV3(dkd_heads(1, 3, 2), backbone="tiny")
    before = model.cls[2].weight.clone()
    METHODS["dkd"](task, {"ac": 0}).start(model, {})
    assert torch.equal(model.cls[2].weight, before)
    METHODS["dkd"](task, {}).start(model, {})
    assert torch.equal(model.cls[2].weight[1], model.cls[0].weight[0])


def test_prediction_rule():
    method = METHODS["dkd"](at_step(0), {})
    logits = torch.tensor([9.0, -1, 0, -2]).view(1, 4, 1, 1)  # 0 is a score of 0.5: not over it
    assert method.predict(ModelOutput(logits)).item() == 0
    logits[0, 3] = 0.1
    assert method.predict(ModelOutput(logits)).item() == 3


def test_saturated_scores_tie():
    """Reference quirk: scores that round to 1 tie, the class that arrived first wins."""
    method = METHODS["dkd"](at_step(0), {})
    logits = torch.tensor([0.0, 40, -5, 50]).view(1, 4, 1, 1)
    assert method.predict(ModelOutput(logits)).item() == 1
