"""A training step of each method with a softmax, and of SSUL, against its formulas written out.

Three iterations in float64 of the whole loop: losses, every parameter, every statistic and what the
method remembers. The formulas are those of the papers and of the authors' code, pixel by pixel and
class by class, without our functions.
"""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from base.batch import Batch
from base.task import Task
from models.model import DeepLabV3
from tests.networks import WAYS, earlier_of, make_config, make_trainer, network
from trainer.methods import METHODS

NAMES = tuple(f"class{i}" for i in range(7))
STEPS = ((1, 2, 3), (4, 5), (6,))
VOID = 255
SIDE = 64  # of the images; the features have 4 by 4 pixels


def at_step(step):
    return Task("voc", "own", "overlap", step, STEPS, NAMES)


# ------------------------------------------------------------------------------------- the network
def outputs(model, images):
    """Stage maps before their ReLU, the backbone's and the decoder's features, logits."""
    net, stages = model.backbone, []
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(images))), 3, 2, 1)
    for (block,) in (net.layer1, net.layer2, net.layer3, net.layer4):
        y = F.relu(block.bn1(block.conv1(x)))
        y = F.relu(block.bn2(block.conv2(y)))
        shortcut = x if block.downsample is None else block.downsample(x)
        stages.append(block.bn3(block.conv3(y)) + shortcut)
        x = F.relu(stages[-1])
    features = model.aspp(x)
    unknown = model.unknown and model.unknown(features)
    return stages, x, features, torch.cat([head(features) for head in model.cls], 1), unknown


def full(logits):
    return F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)


def share_background(model):
    """MiB's start of new classes: background's probability, in equal parts."""
    first, new = model.cls[0], model.cls[-1]
    with torch.no_grad():
        first.bias -= math.log(1 + len(new.bias))
        for row in range(len(new.bias)):
            new.weight[row] = first.weight[0]
            new.bias[row] = first.bias[0]


def copy_unknown(model):
    """SSUL's: the unknown head as a whole, its one row for each class."""
    conv, norm, _, last = model.cls[-1]
    from_conv, from_norm, _, from_last = model.unknown
    with torch.no_grad():
        conv.weight.copy_(from_conv.weight)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(from_norm, name))
        for row in range(len(last.bias)):
            last.weight[row] = from_last.weight[0]
            last.bias[row] = from_last.bias[0]


# --------------------------------------------------------------------------------------- the losses
def mean_nll(probability, labels, weight=1):
    """-log p_y, summed over pixels that are not void, over the number of all pixels."""
    chosen = probability.gather(1, labels.masked_fill(labels == VOID, 0)[:, None])[:, 0]
    return (-torch.log(chosen) * (labels != VOID) * weight).mean()


def unbiased(p, labels, old):
    """MiB: a label below `old` means any of these classes."""
    hidden = p[:, :old].sum(1, keepdim=True)
    whole = torch.cat([hidden, *[torch.zeros_like(hidden)] * (old - 1), p[:, old:]], 1)
    return mean_nll(whole, torch.where(labels < old, 0, labels))


def unbiased_kd(p, q):
    """MiB: the teacher's background is any of the new classes, too."""
    old = q.shape[1]
    loss = q[:, 0] * torch.log(p[:, 0] + p[:, old:].sum(1))
    for c in range(1, old):
        loss = loss + q[:, c] * torch.log(p[:, c])
    return -loss.mean() / old


def bce(scores, targets):
    return -(targets * torch.log(scores) + (1 - targets) * torch.log(1 - scores))


def one_hot(labels, channels):
    return torch.stack([(labels == c).double() for c in range(channels)], 1)


def ft(new, old, labels, task, **_):
    return mean_nll(full(new[3]).softmax(1), labels)


def lwf(new, old, labels, task, **_):
    loss = ft(new, old, labels, task)
    if old is None:
        return loss
    k = old[3].shape[1]
    log_p = torch.log(full(new[3][:, :k]).softmax(1))
    return loss + 100 * -(full(old[3]).softmax(1) * log_p).mean()


def lwf_mc(new, old, labels, task, **_):
    scores = full(new[3]).sigmoid()
    counted = (labels != VOID)[:, None]
    loss = (bce(scores, one_hot(labels, scores.shape[1])) * counted).sum(1).mean()
    if old is None:
        return loss
    k = old[3].shape[1]
    return loss + 10 * k * bce(scores[:, :k], full(old[3]).sigmoid()).mean()


def ilt(new, old, labels, task, **_):
    loss = lwf(new, old, labels, task)
    return loss if old is None else loss + 100 * F.mse_loss(new[1], old[1])


def mib(new, old, labels, task, weight=10, **_):
    p = full(new[3]).softmax(1)
    if old is None:
        return mean_nll(p, labels)
    q = full(old[3]).softmax(1)
    return unbiased(p, labels, q.shape[1]) + weight * unbiased_kd(p, q)


def pooled(a):
    """Φ of PLOP: means over the width and over the height of windows of the squares."""
    parts = []
    for s in (1, 2, 4):
        k = a.shape[-1] // s
        for i in range(s):
            for j in range(s):
                window = (a**2)[:, :, i * k : (i + 1) * k, j * k : (j + 1) * k]
                parts += [window.mean(3).flatten(1), window.mean(2).flatten(1)]
    return torch.cat(parts, 1)


def plop(new, old, labels, task, thresholds, **_):
    if old is None:
        return ft(new, old, labels, task)
    z, target, k = full(new[3]), labels.clone(), old[3].shape[1]
    channels, fresh = z.shape[1], len(task.new)
    q = full(old[3]).softmax(1)
    answer = q.argmax(1)
    unsure = -(q * torch.log(q + 1e-8)).sum(1) / k / math.log(k + 1e-8) / math.log(channels)
    hidden = labels < k
    sure = hidden & (unsure < thresholds[answer])
    assert 0.05 < sure.sum() / hidden.sum() < 0.95, "some are sure, some are not"
    target[hidden] = VOID
    target[sure] = answer[sure]
    nu = sure.sum((1, 2)) / (hidden.sum((1, 2)).double() + 1e-6)
    loss = mean_nll(z.softmax(1), target, nu[:, None, None])
    reduced = new[3][:, :k].clone()
    reduced[:, 0] = reduced[:, 0] + new[3][:, k:].sum(1)
    maps = [*zip([*new[0], new[2]], [*old[0], old[2]], strict=True), (reduced, old[3])]
    for (ours, theirs), weight in zip(maps, [*[0.01] * 5, 0.0005], strict=True):
        distance = (pooled(ours) - pooled(theirs)).square().sum(1).sqrt().mean()
        loss = loss + weight / 6 * math.sqrt(channels / fresh) * distance
    return loss


def sdr(new, old, labels, task, prototypes, counts, **_):
    """Moves the prototypes as well."""
    small, body = labels[:, ::16, ::16], new[1]
    members = lambda c, of: body.permute(0, 2, 3, 1)[of == c]  # noqa: E731
    present = [c for c in small.unique().tolist() if c != VOID]
    with torch.no_grad():
        for c in present:
            if c > 0:  # overlap
                mine = members(c, small)
                both = mine.sum(0) + counts[c] * prototypes[c]
                counts[c] += len(mine)
                prototypes[c] = both / counts[c]
    if old is None:
        return ft(new, old, labels, task)
    loss = mib(new, old, labels, task, weight=100)
    means = {c: members(c, small).mean(0) for c in present}
    seen = full(old[3]).argmax(1)[:, ::16, ::16] * (small == 0)
    classes = [c for c in seen.unique().tolist() if c > 0]
    assert classes, "the teacher sees an old class"
    for c in classes:
        distance = F.mse_loss(members(c, seen).mean(0), prototypes[c])
        loss = loss + 0.01 * distance / len(classes)
    for c in present:
        distance = (members(c, small) - prototypes[c]).square().mean()
        loss = loss + 0.001 * distance / len(present)
    pairs = [1 / (means[a] - means[b]).norm() for a, b in permutations(present, 2)]
    assert pairs
    loss = loss + 0.001 * sum(pairs) / len(pairs)
    sparse = 0
    for c in small.unique().tolist():
        mine = members(c, small)
        mine = mine / (mine.max() + 1e-15)
        sparse = sparse + (mine.exp().sum(1) / (mine.sum(1) + 1e-15)).sum()
    return loss + 0.001 * sparse / small.numel()


def ssul(new, old, labels, task, saliency, **_):
    """In the authors' order of channels: unknown, background, classes."""
    target = torch.where(labels == VOID, VOID, labels + 1)
    target[(target == 1) & (saliency > 0)] = 0
    if old is not None:
        scores, answer = full(torch.cat([old[4], old[3]], 1)).sigmoid().max(1)
        sure = (target <= 1) & (answer > 1) & (scores >= 0.7)
        assert 0.01 < sure.sum() / sure.numel() < 0.99
        target[sure] = answer[sure]
    scores = full(torch.cat([new[4], new[3]], 1)).sigmoid()
    counted = target != VOID
    loss = bce(scores, one_hot(target, scores.shape[1])).sum(1)
    return (loss * counted).sum() / counted.sum()


LOSSES = {f.__name__: f for f in (ft, lwf, lwf_mc, ilt, mib, plop, sdr, ssul)}


# -------------------------------------------------------------------------------------- the update
def plain_sgd(groups, lrs, momentum):
    """SGD with Nesterov momentum 0.9 and weight decay 1e-4."""
    for params, lr in zip(groups, lrs, strict=True):
        for p in params:
            if p.grad is not None:
                grad = p.grad + 1e-4 * p.data
                momentum[p] = 0.9 * momentum[p] + grad if p in momentum else grad.clone()
                p.data -= lr * (grad + 0.9 * momentum[p])


def groups_of(name, model, step):
    """Parameters and their learning rates, relative to the backbone's or the new head's."""
    if name != "ssul":
        return [[*model.parameters()]], [1]
    heads = [*model.cls.parameters(), *model.unknown.parameters()]
    if step == 0:
        return [[*model.backbone.parameters()], [*model.aspp.parameters(), *heads]], [1, 10]
    trained = (model.cls[-1], model.unknown, model.cls[0])
    convolutions = [[*head[0].parameters(), *head[3].parameters()] for head in trained]
    return convolutions, [1, 1, 1e-4]


def teacher_of(plan):
    """A network at random whose logits are about ±2 in each channel: of some pixels it is sure."""
    teacher = DeepLabV3(plan.previous(), backbone="tiny", freeze_all_bn=True)
    teacher = teacher.double().eval().requires_grad_(False)
    seen = outputs(teacher, torch.randn(4, 3, SIDE, SIDE).double())
    logits = torch.cat([seen[3], seen[4]], 1) if plan.unknown else seen[3]
    means, heads = logits.mean((0, 2, 3)), [*teacher.cls]
    scale = 2 / (logits - means[:, None, None]).std()
    for head in [*heads, teacher.unknown] if plan.unknown else heads:
        last = head[-1] if plan.kind == "block" else head
        last.bias.sub_(means[: len(last.bias)]).mul_(scale)
        last.weight.mul_(scale)
        means = means[len(last.bias) :]
    return teacher


def copy_of(teacher, plan):
    """Its own network, for the switches of `fast` rewrite it."""
    other = DeepLabV3(plan.previous(), backbone="tiny", freeze_all_bn=True).double()
    other.load_state_dict(teacher.state_dict())
    return other.eval().requires_grad_(False)


@WAYS
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_training_steps_equal_the_plain_formulas(name, step, fast):
    task = at_step(step)
    lr = 0.0105 if name == "ssul" and step else 1e-3  # background's falls to the floor on the way
    config = make_config(min(step, 1), "PolyLR", fast, method=name, lr=lr)
    plan = METHODS[name](task, {}).heads()
    frozen = name == "ssul" and step > 0  # the others train BatchNorm at every step
    ours, plain = (
        network(plan, dtype=torch.float64, freeze_all_bn=frozen) for _ in ("ours", "plain")
    )
    teacher = None
    if step and name != "ft":
        teacher = teacher_of(plan)
    if step and name in ("mib", "plop"):
        share_background(plain)
    if step and name == "ssul":
        copy_unknown(plain)
    given = {}
    if name == "sdr":
        earlier = earlier_of(name, task)
        given = {"prototypes": torch.zeros(1 + len(task.seen), 512).double()}
        given["counts"] = torch.zeros(1 + len(task.seen)).double()
        for key, value in earlier.items():
            given[key][: len(value)] = value
    trainer = make_trainer(config, task, ours, teacher and copy_of(teacher, plan), method=name)
    if name == "plop":
        most = 1 / ((1 + len(task.old)) * math.log(1 + len(task.seen)))  # of the uncertainty
        given = {"thresholds": torch.linspace(0.7, 0.9, 1 + len(task.seen)) * most}
        trainer.method.load_state(given)
    groups, factors = groups_of(name, plain, step)
    momentum = {}
    for i in range(3):
        images = torch.randn(4, 3, SIDE, SIDE).double()
        choice = torch.tensor([0, 0, *task.new])
        labels = choice[torch.randint(len(choice), (4, SIDE // 8, SIDE // 8))]
        labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        labels[:, :20, :20] = VOID
        batch = Batch(images, labels.to(torch.uint8))
        if name == "ssul":
            given = {"saliency": torch.randint(2, labels.shape).to(torch.uint8)}
            batch = batch._replace(**given)
        answer = None if teacher is None else outputs(teacher, images)
        loss = LOSSES[name](outputs(plain, images), answer, labels, task, **given)
        plain.zero_grad()
        loss.backward()
        floor = 1e-6 if name == "ssul" else 0
        lrs = [max(lr * factor * (1 - i / 10) ** 0.9, floor) for factor in factors]
        plain_sgd(groups, lrs, momentum)
        got = trainer.train_step([batch])
        torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-9, atol=0)
    expected = plain.state_dict()
    for key, value in ours.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=key)
    for key, value in trainer.method.state().items():
        torch.testing.assert_close(value, given[key].to(value), rtol=1e-9, atol=1e-12, msg=key)
