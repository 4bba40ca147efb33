"""What holds of the methods whatever the numbers: identities of their losses, what is frozen, what
a prediction may be, what a checkpoint brings back.
"""

import io
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.base_method import StepContext
from base.base_model import ModelOutput
from base.batch import Batch
from base.task import Task
from models.aspp import Dropout
from models.fast.losses import local_pod
from models.model import DeepLabV3
from scripts.benchmarking.definitions import by_definition
from tests.helpers import PUBLISHED
from tests.networks import WAYS, earlier_of, make_config, make_trainer
from trainer.build import build_student
from trainer.methods import METHODS
from trainer.methods.plop import BINS, FLOOR, thresholds
from trainer.methods.ssul import UNKNOWN

STEPS = ((1, 2, 3), (4, 5), (6,))
VOID = 255


def make(name, step=1, steps=STEPS, **settings):
    names = tuple(f"class{i}" for i in range(1 + sum(map(len, steps))))
    return METHODS[name](Task("voc", "own", "overlap", step, steps, names), settings)


@pytest.fixture(params=["definition", "fast way"])
def way(request):
    """Every way to compute the losses."""
    with by_definition() if request.param == "definition" else nullcontext():
        yield


# -------------------------------------------------------------------------------- MiB's unbiased CE
def mib_ce(step, logits, labels):
    method = make("mib", step)
    teacher = ModelOutput(logits.new_zeros(len(logits), method.known, 8, 8)) if step else None
    return method.losses(Batch(None, labels), ModelOutput(logits), teacher, torch.clone)["ce"]


def test_unbiased_ce_of_background_alone_is_plain_ce(way):
    logits, labels = torch.randn(2, 4, 8, 8).double(), torch.randint(4, (2, 8, 8)).byte()
    labels[:, 0] = VOID
    plain = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="none").mean()
    torch.testing.assert_close(mib_ce(0, logits, labels)[0], plain, rtol=1e-12, atol=0)


def test_unbiased_ce_does_not_tell_old_classes_apart(way):
    logits, labels = torch.randn(2, 6, 8, 8).double(), torch.randint(6, (2, 8, 8)).byte()
    other = torch.tensor([2, 3, 0, 1, 4, 5], dtype=torch.uint8)[labels.long()]
    assert not torch.equal(labels, other)
    assert torch.equal(mib_ce(1, logits, labels), mib_ce(1, logits, other))
    new = torch.tensor([0, 1, 2, 3, 5, 4], dtype=torch.uint8)[labels.long()]
    assert not torch.equal(mib_ce(1, logits, labels), mib_ce(1, logits, new))


def test_void_has_no_gradient_of_unbiased_ce(way):
    logits = torch.randn(2, 6, 8, 8).requires_grad_()
    labels = torch.randint(6, (2, 8, 8)).byte()
    labels[:, :3] = VOID
    mib_ce(1, logits, labels).sum().backward()
    assert not logits.grad[:, :, :3].any()
    assert logits.grad[:, :, 3:].any(1).all()


# --------------------------------------------------------------------------------------------- PLOP
def plop_terms(method, maps, old_maps, logits, old_logits):
    student = ModelOutput(logits, stages=maps[:4], features=maps[4])
    teacher = ModelOutput(old_logits, stages=old_maps[:4], features=old_maps[4])
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    return method.losses(Batch(None, labels), student, teacher, torch.clone)


def test_local_pod_of_equal_models_is_zero():
    """Also where new classes take from background what the teacher calls background."""
    maps = [torch.randn(2, 3, 8, 8) for _ in range(5)]
    old = torch.randn(2, 4, 8, 8)
    new = torch.randint(-4, 4, (2, 2, 8, 8)).float()  # sums of whole numbers have no rounding
    old[:, 0] = old[:, 0].round()
    logits = torch.cat([old[:, :1] - new.sum(1, keepdim=True), old[:, 1:], new], 1)
    terms = plop_terms(make("plop"), maps, maps, logits, old)
    assert not terms["pod"].any()
    assert not terms["pod_logits"].any()
    logits[:, 4] += 1
    assert plop_terms(make("plop"), maps, maps, logits, old)["pod_logits"] > 0


@pytest.mark.parametrize(
    ("sizes", "first", "last"),
    [
        ((19, 1), 4.58, 4.58),
        ((15, 5), 2.05, 2.05),
        ((15, *[1] * 5), 4.12, 4.58),
        ((10, *[1] * 10), 3.46, 4.58),
        ((100, 50), 1.74, 1.74),
        ((100, *[10] * 5), 3.33, 3.89),
        ((50, 50, 50), 1.42, 1.74),
    ],
    ids=lambda value: "-".join(map(str, value[:2])) if isinstance(value, tuple) else None,
)
def test_factor_of_local_pod(sizes, first, last):
    """√(seen / new) of the published tasks, background counted."""
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    steps = tuple(tuple(range(1 + end - n, 1 + end)) for end, n in zip(ends, sizes, strict=True))
    maps, zeros = [torch.randn(2, 3, 8, 8)] * 5, [torch.zeros(2, 3, 8, 8)] * 5
    for step, factor in ((1, first), (len(sizes) - 1, last)):
        method = make("plop", step, steps)
        logits = torch.zeros(2, method.channels, 8, 8)
        terms = plop_terms(method, maps, zeros, logits, logits[:, : method.known])
        alone = local_pod(maps[0], zeros[0])
        found = 6 * terms["pod"] / alone
        torch.testing.assert_close(found, torch.full((5,), factor), rtol=0, atol=0.0051)


def test_share_of_plop_in_float64():
    """ν, the sure share of an image's background, of sizes whose shares have no short form."""
    method, teacher = make("plop"), ModelOutput(3 * torch.randn(3, 4, 7, 9).double())
    method.load_state({"thresholds": torch.full((6,), 0.05)})
    labels = torch.randint(0, 6, (3, 7, 9)).byte()
    found = method.pseudo_labels(labels, teacher)[1]
    q = teacher.logits.softmax(1)
    unsure = -(q * (q + 1e-8).log()).sum(1) / 4 / math.log(4 + 1e-8) / math.log(6)
    for nu, image, places in zip(found, unsure, labels < 4, strict=True):
        sure = int((image[places] < torch.tensor(0.05)).sum())
        assert 0 < sure < int(places.sum())
        assert nu.item() == pytest.approx(sure / (int(places.sum()) + 1e-6), rel=1e-12)


def test_thresholds_of_plop_in_float64():
    """The median inside its bin, with all digits."""
    histogram = torch.zeros(1, BINS)
    histogram[0, :2] = torch.tensor([3.0, 7.0])
    expected = (1 + (5 - 3) / 7) / BINS
    assert thresholds(histogram, "paper").item() == pytest.approx(expected, rel=1e-12)


def plop_pass(labels, logits, **settings):
    """The thresholds that a pass over one batch finds."""
    method, maps = make("plop", **settings), tuple(torch.zeros(1, 1, 4, 4) for _ in range(5))
    teacher = ModelOutput(logits, stages=maps[:4], features=maps[4])
    method.begin_step(context_of(Batch(None, labels), teacher, torch.clone))
    return method.thresholds


def test_the_pass_of_plop_looks_at_background_alone():
    """Where masks name old classes as well, as in the sequential setting."""
    logits = 3 * torch.randn(1, 4, 16, 16)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    expected = plop_pass(labels[:, :8], logits[:, :, :8], uncertainty="paper")
    labels[:, 8:] = torch.randint(1, 6, (1, 8, 16))
    assert expected[:4].min() > 0.01
    assert torch.equal(plop_pass(labels, logits, uncertainty="paper"), expected)


def test_a_teacher_that_knows_nothing_is_in_the_last_bin():
    labels, logits = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, 4)
    found = plop_pass(labels, logits, uncertainty="paper")
    assert found.tolist() == pytest.approx([0.995, *[FLOOR] * 5])


# ---------------------------------------------------------------------------------------------- SDR
def sdr(labels, body, **settings):
    """The terms of a batch at step 1 whose labels have the features' resolution."""
    method = make("sdr", 1, **settings)
    old = 1 + len(method.task.old)
    earlier = {"prototypes": torch.rand(old, body.shape[1]), "counts": torch.ones(old).double()}
    method.start(None, earlier)
    student = ModelOutput(torch.randn(len(body), 6, *body.shape[2:]), backbone_features=body)
    teacher = ModelOutput(torch.randn(len(body), old, *body.shape[2:]))
    return method, method.losses(Batch(None, labels), student, teacher, torch.clone)


def test_prototypes_of_constant_features_are_these():
    """Features that differ by channel alone, several images."""
    constants = torch.arange(1.0, 6)
    body = constants[:, None, None].expand(3, 5, 4, 4)
    labels = torch.tensor([4, 5], dtype=torch.uint8).repeat(3, 4, 2)
    method, _ = sdr(labels, body)
    assert torch.equal(method.prototypes[4:], constants.expand(2, 5))
    official, _ = sdr(labels, body, official=True)
    assert not torch.equal(official.prototypes[4:], constants.expand(2, 5)), "the quirk mixes them"


def test_attraction_of_two_classes_is_their_average():
    body, labels = torch.rand(2, 5, 4, 4), torch.full((2, 4, 4), 4, dtype=torch.uint8)
    labels[:, 1] = 5
    method, terms = sdr(labels, body)
    pixels = body.permute(0, 2, 3, 1)
    each = [(pixels[labels == c] - method.prototypes[c]).square().mean() for c in (4, 5)]
    torch.testing.assert_close(terms["attract"][0], sum(each) / 2)


def test_one_class_is_not_repelled():
    body = torch.rand(2, 5, 4, 4).requires_grad_()
    labels = torch.full((2, 4, 4), 4, dtype=torch.uint8)
    (gradient,) = torch.autograd.grad(sdr(labels, body)[1]["repulse"].sum(), body)
    assert sdr(labels, body)[1]["repulse"] == 0
    assert not gradient.any()
    labels[0, 0, 0] = 5
    assert sdr(labels, body)[1]["repulse"] > 0


def test_classes_of_equal_features_are_not_repelled():
    """Their distance has no direction, and no inverse."""
    body = torch.ones(1, 5, 4, 4).requires_grad_()
    labels = torch.tensor([4, 5], dtype=torch.uint8).repeat(1, 4, 2)
    repulse = sdr(labels, body)[1]["repulse"]
    (gradient,) = torch.autograd.grad(repulse.sum(), body)
    assert repulse == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("setting", "step", "moves"),
    [("overlap", 0, False), ("disjoint", 0, True), ("disjoint", 1, False)],
)
def test_background_has_a_prototype_where_it_is_no_other_class(setting, step, moves):
    names = tuple(f"class{i}" for i in range(7))
    method = METHODS["sdr"](Task("voc", "own", setting, step, STEPS, names), {})
    method.start(None, {"prototypes": torch.rand(4, 5), "counts": torch.ones(4).double()})
    before = method.counts.clone()
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    student = ModelOutput(
        torch.randn(1, 1 + len(method.task.seen), 4, 4), backbone_features=torch.rand(1, 5, 4, 4)
    )
    teacher = ModelOutput(torch.randn(1, 4, 4, 4)) if step else None
    method.losses(Batch(None, labels), student, teacher, torch.clone)
    assert (method.counts - before).tolist() == [16 * moves, *[0] * len(method.task.seen)]


def test_features_that_overflow_do_not_move_a_prototype():
    """Nor is it said that it has seen them: the update is skipped as a whole."""
    body = torch.rand(1, 5, 4, 4)
    body[0, 0, 0, 0] = torch.inf
    labels = torch.tensor([4, 5], dtype=torch.uint8).repeat(1, 4, 2)
    method, _ = sdr(labels, body)
    assert method.counts.tolist() == [1, 1, 1, 1, 0, 0]
    assert method.prototypes.isfinite().all()
    assert not method.prototypes[4:].any()


def test_sparsity_of_relu_features():
    """At least e, for exp(x) ≥ e x; nothing where all is background."""
    labels = torch.randint(0, 6, (2, 4, 4)).byte()
    body = torch.randn(2, 5, 4, 4).relu()
    body[:, 0] = body[:, 0].clamp(min=0.1)  # a pixel without any feature has none to spread
    assert sdr(labels, body)[1]["sparse"] >= math.e
    assert sdr(torch.zeros_like(labels), body)[1]["sparse"] == 0


# --------------------------------------------------------------------------------------------- SSUL
def ssul_trainer(fast=True, step=1):
    method = make("ssul", step)
    config = make_config(min(step, 1), "PolyLR", fast, method="ssul", lr=1e-2)
    plan, frozen = method.heads(), step > 0
    student = DeepLabV3(plan, backbone="tiny", freeze_all_bn=frozen)
    teacher = None
    if step:
        teacher = DeepLabV3(plan.previous(), backbone="tiny").eval().requires_grad_(False)
    return make_trainer(config, method.task, student, teacher, method="ssul")


def ssul_batch():
    labels = torch.randint(0, 6, (2, 64, 64)).byte()
    return Batch(torch.randn(2, 3, 64, 64), labels, saliency=labels % 2)


def test_new_head_of_ssul_is_the_unknown_one():
    student = ssul_trainer().student.eval()
    output = student(torch.randn(2, 3, 64, 64), {"unknown"})
    new = output.logits[:, 4:]
    torch.testing.assert_close(new, output.unknown.expand_as(new), rtol=1e-5, atol=1e-6)


@WAYS
def test_ssul_trains_the_convolutions_of_three_heads(fast):
    """At steps > 0; the statistics of BatchNorm and all else stay, bit by bit."""
    trainer = ssul_trainer(fast)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    for _ in range(3):
        trainer.train_step([ssul_batch()])
    heads = ("cls.0", "cls.2", "unknown")
    trained = {f"{head}.{name}" for head in heads for name in ("0.weight", "3.weight", "3.bias")}
    with_gradient = {n for n, p in trainer.student.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    after = trainer.student.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


@WAYS
def test_the_frozen_trunk_of_ssul_keeps_nothing_for_the_backward_pass(fast):
    trainer, seen = ssul_trainer(fast), []
    for part in trainer.student.parts()[:2]:
        for module in part.modules():
            module.register_forward_hook(
                lambda module, given, result: seen.append(
                    result[0] if isinstance(result, tuple) else result
                )
            )
    trainer.train_step([ssul_batch()])
    assert len(seen) > 50
    assert all(result.grad_fn is None and not result.requires_grad for result in seen)


def test_ssul_answers_background_where_the_unknown_is_sure():
    method = make("ssul")
    logits = torch.full((1, 6, 1, 1), -40.0)
    logits[0, 4] = 4  # a class with a score of 0.98
    output = ModelOutput(logits, unknown=torch.full((1, 1, 1, 1), -40.0))
    assert method.predict(output).item() == 4
    assert method.predict(output._replace(unknown=-output.unknown)).item() == 0


def test_share_of_ssul_in_float64():
    """The mean over pixels that are not void, with all digits of a share that has no short form."""
    method = make("ssul", unknown="all")
    logits, unknown = torch.randn(3, 6, 7, 9).double(), torch.randn(3, 1, 7, 9).double()
    labels = torch.randint(0, 6, (3, 7, 9)).byte()
    labels[0, :3, :7] = VOID
    teacher = ModelOutput(logits[:, :4] - 50, unknown=unknown)  # it is sure of nothing
    output = ModelOutput(logits, unknown=unknown)
    found = method.losses(Batch(None, labels), output, teacher, torch.clone)["bce"]
    scores = torch.cat([unknown, logits], 1).sigmoid()
    is_class = torch.stack([labels == 0, *(labels == c for c in range(6))], 1)
    is_class[:, 1] = False  # all of background is unknown
    each = -torch.where(is_class, scores, 1 - scores).log() * (labels != VOID)[:, None]
    expected = each.sum((0, 2, 3)) / (3 * 7 * 9 - 3 * 7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_ssul_of_void_alone_is_zero():
    method, void = make("ssul", unknown="all"), torch.full((1, 4, 4), VOID, dtype=torch.uint8)
    logits = torch.randn(1, 6, 4, 4).requires_grad_()
    teacher = ModelOutput(torch.randn(1, 4, 4, 4), unknown=torch.randn(1, 1, 4, 4))
    output = ModelOutput(logits, unknown=torch.randn(1, 1, 4, 4))
    term = method.losses(Batch(None, void), output, teacher, torch.clone)["bce"]
    (gradient,) = torch.autograd.grad(term.sum(), logits)
    assert not term.any()
    assert not gradient.any()


@pytest.mark.parametrize(("least", "label"), [(0.5, 2), (0.51, 0)])
def test_a_score_of_just_the_confidence_of_ssul_is_enough(least, label):
    method = make("ssul", confidence=least)
    low = torch.full((1, 1, 1, 1), -50.0)
    teacher = ModelOutput(torch.cat([low, low, 0 * low, low], 1), unknown=low)
    background = torch.zeros(1, 1, 1, dtype=torch.uint8)
    batch = Batch(None, background, saliency=background)
    assert method.targets(batch, teacher).item() == label


def test_pseudo_labels_of_ssul_without_a_least_score():
    """With `confidence` 0 every class that wins is a label; background and the unknown are none."""
    method = make("ssul", unknown="all", confidence=0)
    scores = torch.tensor([[0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.1, 0.2, 0.3], [0.1, 0.1, 0.1]])
    background, old, unknown = scores.logit().t()[:, None, None, None]  # each [1, 1, 1, 4]
    rest = torch.full_like(old, -50)
    teacher = ModelOutput(torch.cat([background, rest, old, rest], 1), unknown=unknown)
    labels = torch.zeros(1, 1, 4, dtype=torch.uint8)
    targets = method.targets(Batch(None, labels), teacher)
    assert targets.flatten().tolist() == [UNKNOWN, 2, UNKNOWN, UNKNOWN]
    labelled = torch.tensor([[[4, 4, VOID, VOID]]], dtype=torch.uint8)
    targets = method.targets(Batch(None, labelled), teacher)
    assert targets.flatten().tolist() == [4, 4, *2 * [torch.iinfo(torch.int32).max]]


# -------------------------------------------------------------------------------------- all of them
def made_up_outputs(channels):
    """Name → map of four images, of everything that a method may ask for."""
    sizes = {"logits": channels, "pos": channels - 1, "neg": channels - 1, "unknown": 1}
    sizes |= {
        "backbone_features": 5,
        "features": 3,
        **{f"stage {number}": 3 for number in range(4)},
    }
    return {name: torch.randn(4, size, 8, 8).double() for name, size in sizes.items()}


def output_of(maps, part):
    """The output of a part of the images, and its leaves by name."""
    leaves = {name: value[part].clone().requires_grad_() for name, value in maps.items()}
    stages = tuple(leaves[f"stage {number}"] for number in range(4))
    rest = {name: value for name, value in leaves.items() if not name.startswith("stage ")}
    return ModelOutput(**rest, stages=stages), leaves


@pytest.mark.parametrize("name", ["ft", "lwf", "lwf_mc", "ilt", "mib", "sdr"])
def test_void_is_trained_as_background_on_request_alone(name):
    """The setting `official`, in every term that reads labels."""
    new, old = (made_up_outputs(channels) for channels in (6, 4))
    labels = torch.randint(0, 6, (4, 16, 16)).byte()
    labels[:, :4] = 0
    void = labels.clone()
    void[:, :4] = VOID

    def terms_of(labels, official):
        method = make(name, official=official)
        if name == "sdr":
            method.start(None, {"prototypes": torch.zeros(4, 5), "counts": torch.ones(4)})
        outputs = (output_of(maps, slice(None))[0] for maps in (new, old))
        terms = method.losses(Batch(None, labels), *outputs, torch.clone)
        return {key: term.sum().detach() for key, term in terms.items()}

    assert terms_of(void, True) == terms_of(labels, True)
    label_term = "bce" if name == "lwf_mc" else "ce"
    trained, void_left_out = (terms_of(void, official)[label_term] for official in (True, False))
    assert void_left_out < trained == terms_of(labels, False)[label_term]


# at step 0, and later
DROPOUT = {"dkd": (True, False), "finetune": (True, False), "ssul": (True, True)}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_which_steps_have_dropout(name, step):
    """As in the published codes; the decoder of MiB's family has none."""
    config = make_config(step, "PolyLR", method=name)
    arch = {"arch.args.backbone": "tiny", "arch.args.backbone_pretrained": False}
    config = config.with_values(arch)
    student = build_student(config, make(name, step))
    expected = DROPOUT.get(name, (False, False))[step]
    drops = [part.training for part in student.train().modules() if isinstance(part, Dropout)]
    assert drops == [expected]


class OnlyDouble(TorchDispatchMode):
    """No operation inside may give a number of fewer digits than float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                assert each.dtype is torch.float64, func
        return result


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_in_float64_computes_nothing_in_float32(name, step, way):
    """Neither the pass before the step, nor losses, their gradient, and what is seen."""
    method = make(name, step)
    task = method.task
    if name == "sdr":
        method.start(None, {"prototypes": torch.rand(4, 5), "counts": torch.ones(4).double()})
    new, old = (made_up_outputs(1 + len(classes)) for classes in (task.seen, task.old))
    output, teacher = (output_of(maps, slice(None))[0] for maps in (new, old))
    labels = torch.randint(0, 1 + len(task.seen), (4, 16, 16)).byte()
    batch = Batch(None, labels, saliency=labels % 2)
    context = context_of(batch, teacher if step else None, torch.clone)
    with OnlyDouble():
        with torch.no_grad():
            method.begin_step(context)
        terms = method.losses(batch, output, teacher if step else None, torch.clone)
        sum(term.sum() for term in terms.values()).backward()
        method.end_step(context)
        method.predict(output, (16, 16))
        method.confident(output, (16, 16))


@pytest.mark.parametrize("name", ["dkd", "mib", "ssul"])  # one of each family
def test_a_network_in_float64_computes_nothing_in_float32(name):
    student = DeepLabV3(make(name).heads(), backbone="tiny").double()
    wants = {
        "dkd": {"pos_neg"},
        "mib": {"stages", "backbone_features", "features"},
        "ssul": {"unknown"},
    }[name]
    images = torch.randn(2, 3, 32, 32).double()
    with OnlyDouble():
        sum(
            each.sum() for each in tree_leaves(student(images, wants)) if each is not None
        ).backward()


def context_of(batch, teacher, total):
    """What precedes a step, with an output as the teacher's answer to everything."""
    answer = None if teacher is None else lambda images, wants: teacher
    return StepContext(torch.nn.Linear(1, 1), answer, lambda _: iter([batch]), 1, total)


def on_two_ranks(run):
    """What `run(rank, total)` returns for ranks 0 and 1, without processes.

    Each runs twice: first to learn what it hands to `total`, then with the sums of both.
    """
    given = [[], []]
    for rank, own in enumerate(given):
        run(rank, lambda values, own=own: own.append(values.detach().clone()) or own[-1].clone())
    sums = [first + second for first, second in zip(*given, strict=True)]
    results = []
    for rank in (0, 1):
        left = [each.clone() for each in reversed(sums)]
        results.append(run(rank, lambda _, left=left: left.pop()))
    return results


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_two_ranks_are_one(name, step):
    """Terms, the mean gradient and what is remembered; classes of either rank alone among them.

    Without SDR's L_sp, whose largest feature of a class is that of one process's images.
    """
    task = make(name, step).task
    new, old = (made_up_outputs(1 + len(classes)) for classes in (task.seen, task.old))
    labels = torch.randint(0, 1 + len(task.seen), (4, 16, 16)).byte()
    labels[:2][labels[:2] == task.new[0]] = 0
    labels[2:][labels[2:] == task.new[1]] = VOID
    saliency = torch.randint(2, labels.shape).byte()
    earlier = {"prototypes": torch.rand(1 + len(task.old), 5), "counts": torch.ones(4).double()}

    def run(rank, total):
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        method, batch = make(name, step), Batch(None, labels[part], saliency=saliency[part])
        student, teacher = (output_of(maps, part) for maps in (new, old))
        if name == "sdr":
            method.start(None, earlier)
        targets = teacher[0] if step else None
        with torch.no_grad():
            method.begin_step(context_of(batch, targets, total))
        terms = method.losses(batch, student[0], targets, total)
        terms.pop("sparse", None)
        sum(method.weights[key] * term.sum() for key, term in terms.items()).backward()
        gradients = {key: leaf.grad for key, leaf in student[1].items() if leaf.grad is not None}
        return {key: term.detach() for key, term in terms.items()}, gradients, method.state()

    terms, gradients, state = run(None, torch.clone)
    first, second = on_two_ranks(run)
    mean = {key: (first[0][key] + second[0][key]) / 2 for key in terms}
    torch.testing.assert_close(mean, terms, rtol=1e-10, atol=1e-14)
    both = {key: torch.cat([first[1][key], second[1][key]]) / 2 for key in gradients}
    torch.testing.assert_close(both, gradients, rtol=1e-9, atol=1e-13)
    for each in (first, second):
        torch.testing.assert_close(each[2], state, rtol=1e-10, atol=0)


@pytest.mark.parametrize("step", range(len(STEPS)))
@pytest.mark.parametrize("name", PUBLISHED)
def test_predictions_are_channels_of_seen_classes(name, step):
    method = make(name, step)
    channels = 1 + len(method.task.seen)
    logits = 5 * torch.randn(4, channels, 16, 16)
    logits[:, -1, 3:6] = 50
    output = ModelOutput(logits, unknown=torch.randn(4, 1, 16, 16))
    for size in (None, (33, 47)):
        preds = method.predict(output, size)
        assert preds.shape == (4, *(size or (16, 16)))
        assert preds.min() == 0
        assert preds.max() == channels - 1
    channel, score = method.confident(output, (16, 16))
    assert channel.min() >= 1
    assert channel.max() < channels
    assert ((score >= 0) & (score <= 1)).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_survives_a_checkpoint(name):
    """The next iteration is the same to the bit, in a method that has seen no other."""
    method, other = make(name), make(name)
    plan = method.heads()
    torch.manual_seed(2)
    student, teacher = DeepLabV3(plan, backbone="tiny"), DeepLabV3(plan.previous(), backbone="tiny")
    teacher.eval()
    for each in (method, other):
        each.start(student, earlier_of(name, method.task))
    batch = ssul_batch()
    with torch.no_grad():
        outputs = student(batch.images, method.wants), teacher(batch.images, method.wants)
    if name == "plop":
        method.load_state({"thresholds": torch.linspace(0, 0.1, 6)})
    method.losses(batch, *outputs, torch.clone)
    file = io.BytesIO()
    torch.save(method.state(), file)
    file.seek(0)
    other.load_state(torch.load(file, weights_only=True))
    expected, found = (each.losses(batch, *outputs, torch.clone) for each in (method, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[term], found[term]) for term in expected)
    for key, value in method.state().items():
        assert torch.equal(other.state()[key], value)


# -------------------------------------------------------------------------------- where heads start
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_random_heads_start_as_the_authors_do(name, step):
    """DKD's and SSUL's by Kaiming's normal distribution, those of MiB's family as PyTorch draws.

    Of 256 features, the first has a deviation of 0.088, the other 0.036 and no weight over 0.0625.
    """
    classes = ((*range(1, 101),), (*range(101, 151),))
    model = DeepLabV3(make(name, step, classes).heads(), backbone="tiny")
    torch_draws = METHODS[name].family == "background"
    for head in model.parts().heads[1:]:
        for weight in (m.weight for m in head.modules() if isinstance(m, torch.nn.Conv2d)):
            fan_in = weight[0].numel()
            deviation = (1 / (3 * fan_in) if torch_draws else 2 / fan_in) ** 0.5
            assert weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert (weight.abs().max().item() <= fan_in**-0.5) is torch_draws
    project = model.aspp.project[0].weight
    assert project.std().item() == pytest.approx((2 / project[0].numel()) ** 0.5, rel=0.05)
