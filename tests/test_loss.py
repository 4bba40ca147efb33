"""The losses: every fast way equals its definition; chunks, memory and prediction.

What compares with a definition lets autograd differentiate it, in float64 where digits count.
"""

import inspect
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from base.base_model import ModelOutput
from base.task import Task
from models import loss, pixels
from models.fast import losses as fast_loss
from models.fast.binary import Bilinear
from models.pixels import (
    Rows,
    bands,
    chunks,
    highest_logit,
    softmax_score,
    upsample,
)
from scripts.benchmarking.definitions import FAST_WAYS, by_definition
from tests.helpers import PUBLISHED
from tests.losses import SIGMOID, TERMS, VOID, both, chunked, errors, exact, make, plain
from trainer.methods import METHODS
from trainer.methods.sigmoid import THRESHOLD

SIZES = [  # h×w, H×W: output stride 16, odd, no whole multiple, equal, smaller
    ((4, 4), (64, 64)),
    ((5, 5), (65, 65)),
    ((6, 7), (83, 100)),
    ((9, 3), (13, 48)),
    ((8, 6), (8, 6)),
    ((8, 6), (4, 5)),
]


@pytest.fixture
def planes(monkeypatch):
    """Set how many planes of a size make a chunk."""

    def set_planes(count, size, dtype=torch.float32):
        chunk = int(count * size[0] * size[1] * dtype.itemsize)
        monkeypatch.setattr(pixels, "CPU_CHUNK", chunk)

    return set_planes


# ------------------------------------------------------------------ every fast way and definition
NO_FAST_WAY = {
    "binary_cross_entropy": "what the terms are made of: it is given full resolution",
    "strips": "what Local POD is made of",
}
SOFTMAX = (loss.cross_entropy, loss.soft_distillation)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of a wider map": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "transposed": lambda x: x.mT.contiguous().mT,
}
USUAL = {"images": 2, "classes": 5, "small": (4, 3), "size": (64, 48), "layout": "contiguous"}
CASES = [
    *({"small": small, "size": size} for small, size in SIZES),
    *({"layout": layout} for layout in LAYOUTS),
    *({"classes": 1}, {"images": 1}, {"small": (1, 1)}, {"size": (1, 1)}),
    *({"size": None}, {"size": None, "layout": "channels last"}),
    *({"pos_weight": 35.0}, {"void": True}, {"void": True, "pos_weight": 0.5}),
    *({"void_counts": False}, {"void_counts": False, "pos_weight": 2.5}),
    *({"void_counts": False, "void": True}, {"old": 3}, {"old": 5}, {"classes": 1, "old": 1}),
    *({"weight": True}, {"weight": True, "old": 3}, {"void": True, "old": 3}),
    *({"known": 3}, {"known": 1}, {"known": 3, "size": None, "layout": "channels last"}),
]


def random_case(seed):
    draw = random.Random(seed)
    sides = [draw.randint(1, most) for most in (9, 9, 70, 70)]
    case = {
        "images": draw.randint(1, 3),
        "classes": draw.randint(1, 7),
        "small": tuple(sides[:2]),
        "size": draw.choice([tuple(sides[2:]), None]),
        "layout": draw.choice(list(LAYOUTS)),
        "pos_weight": draw.choice([1.0, 2.5, 35.0]),
        "void": draw.random() < 0.1,
        "void_counts": draw.random() < 0.7,
        "planes": draw.randint(1, 21),
    }
    return case | {
        "old": draw.choice([1, min(3, case["classes"]), case["classes"]]),
        "known": draw.randint(1, case["classes"]),
        "weight": draw.random() < 0.3,
    }


def arguments(
    definition,
    dtype,
    images,
    classes,
    small,
    size,
    layout,
    pos_weight=1.0,
    void=False,
    void_counts=True,
    old=1,
    known=None,
    weight=False,
):
    """What a loss asks for, by the names of its parameters."""
    arrange, softmax = LAYOUTS[layout], definition in SOFTMAX
    if definition is loss.local_pod:
        small = tuple(side + 3 for side in small)
    maps = (arrange((3 * torch.randn(images, classes, *small)).to(dtype)) for _ in "st")
    logits, teacher = maps
    labels = torch.randint(0, classes if softmax else 4 + classes, (images, 1, *(size or small)))
    labels = torch.full_like(labels, VOID) if void else labels
    labels[..., 0] = VOID
    given = {
        "logits": logits,
        "maps": logits,
        "teacher": teacher[:, :known] if softmax else teacher,
        "labels": arrange(labels.to(torch.uint8))[:, 0],
        "first_channel": 3,
        "pos_weight": pos_weight,
        "void_counts": void_counts,
        "size": size,
        "old": old,
        "weight": torch.arange(images) / 2 if weight else None,
    }
    return {name: given[name] for name in inspect.signature(definition).parameters}


def in_float64(value):
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


@pytest.mark.parametrize("definition", FAST_WAYS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("case", [*CASES, *map(random_case, range(24))], ids=str)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_fast_way_equals_definition(definition, case, dtype, most, planes):
    """Value and gradient, relative to the class where every class has a value of its own.

    The definition computes in float64 also for float32, where autograd's own gradient is 1e-6 off.
    """
    case = USUAL | case
    planes(case.pop("planes", 100), case["size"] or case["small"], dtype)
    given = arguments(definition, dtype, **case)
    exact = {name: in_float64(value) for name, value in given.items()}
    first, *_ = given  # the one that has a gradient

    def found(function, given):
        rest = {name: value for name, value in given.items() if name != first}
        logits = given[first].requires_grad_()
        return both(lambda _, logits: function(logits, **rest), None, logits)

    got = found(FAST_WAYS[definition], given)
    assert got[0].dtype is got[1].dtype is dtype
    assert errors(got, found(definition, exact)).max() < most


def test_every_loss_has_a_fast_way_or_is_known_to_have_none():
    public = {
        name
        for name, value in vars(loss).items()
        if inspect.isfunction(value) and value.__module__ == loss.__name__ and name[0] != "_"
    }
    with_fast_way = {definition.__name__ for definition in FAST_WAYS}
    assert public == with_fast_way | NO_FAST_WAY.keys()
    assert not with_fast_way & NO_FAST_WAY.keys()


def test_fast_ways_are_called_as_their_definitions():
    for definition, fast in FAST_WAYS.items():
        assert inspect.signature(fast) == inspect.signature(definition)
        assert fast.__name__ == definition.__name__


@pytest.mark.parametrize("term", TERMS)
def test_which_way_is_chosen(term, monkeypatch):
    """The fast one, unless it is switched off: then the definition to the bit."""
    given = make((4, 3), (64, 48))
    fast, defined = both(chunked, term, *given), both(plain, term, *given)
    assert not torch.equal(fast[1], defined[1]), "they round differently, which tells them apart"
    with by_definition():
        assert all(map(torch.equal, both(chunked, term, *given), defined))
    with pytest.raises(ValueError, match="inside"), by_definition():
        raise ValueError("inside")
    assert all(map(torch.equal, both(chunked, term, *given), fast))


@pytest.mark.parametrize("method", PUBLISHED)
def test_methods_call_what_has_a_fast_way_by_its_fast_name(method):
    """A definition that a method imports would be computed as it is, unnoticed."""
    names = vars(sys.modules[METHODS[method].__module__])
    slow = [n for n, v in names.items() if any(v is known for known in FAST_WAYS)]
    assert not slow, "import them from models.fast.losses"


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 14, 100])
def test_any_chunk_gives_the_same(term, count, planes):
    """Seven classes of two images: one plane, one class, part of the classes, everything."""
    size = (64, 48)
    planes(count, size)
    given = make((4, 3), size)
    parts = chunks(given[0], size)
    covered = torch.zeros(2, 7)
    for part in parts:
        covered[part] += 1
        assert covered[part].numel() <= max(count, 1)
    assert (covered == 1).all()
    assert len(parts) == {1: 14, 2: 7, 3: 7, 4: 4, 5: 4, 14: 1, 100: 1}[count]
    assert errors(both(chunked, term, *given), exact(term, *given)).max() < 1e-6


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("small", "size"), [((2, 3), (6, 7)), ((3, 2), (9, 8))])
def test_gradcheck(term, small, size, planes):
    planes(3, size, torch.float64)
    logits, *rest = make(small, size, classes=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: chunked(term, x, *rest), logits)


def test_upsampling_and_adjoint():
    """To the bit in float64 up to the order of additions; ⟨up x, g⟩ = ⟨x, adjoint g⟩."""
    for small, size in SIZES:
        x = torch.randn(2, 3, *small, dtype=torch.float64)
        g = torch.randn(size[0], 2, 3, size[1], dtype=torch.float64)
        bilinear = Bilinear(x, size)
        up = bilinear.up(x, torch.empty_like(g))
        torch.testing.assert_close(
            up.permute(1, 2, 0, 3), upsample(x, size), rtol=1e-14, atol=1e-14
        )
        torch.testing.assert_close((up * g).sum(), (x * bilinear.adjoint(g)).sum())


def test_bands_and_adjoint(planes):
    """Whatever the rows of a band: as `upsample`, and ⟨up x, g⟩ = ⟨x, adjoint g⟩."""
    for small, size in [*SIZES, ((7, 2), (300, 5)), ((33, 33), (512, 512))]:
        for count in (1, 5, 1000):
            planes(count * 3, (1, size[1]), torch.float64)
            x = torch.randn(1, 3, *small, dtype=torch.float64)
            g = torch.randn(size[0], 3, size[1], dtype=torch.float64)
            rows, up = Rows(x, size), torch.empty_like(g)
            wide = rows.widen(x[0])
            slope = torch.zeros_like(wide)
            for band in bands(x, size):
                rows.up(wide, band, up[band])
                rows.add_adjoint(g[band], band, slope)
            expected = upsample(x, size)[0].transpose(0, 1)
            torch.testing.assert_close(up, expected, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close((up * g).sum(), (x[0] * rows.narrow(slope)).sum())


def test_a_student_that_agrees_with_its_teacher_is_left_alone():
    """To the bit: so it is at the start of every step, and rounding must not train it."""
    logits = make((4, 5), (64, 48))[0]
    for way in (loss, fast_loss):
        for size in (None, (64, 48)):
            terms = way.distillation(logits, logits.detach(), size)
            assert not torch.autograd.grad(terms.sum(), logits)[0].any()
        terms = way.local_pod(logits, logits.detach())
        assert not torch.autograd.grad(terms.sum(), logits)[0].any(), "nor NaN"
    terms = fast_loss.soft_distillation(logits, logits.detach(), (64, 48))
    assert not torch.autograd.grad(terms.sum(), logits)[0].any(), "no new classes"


def test_old_classes_far_below_the_new_ones():
    """exp would make zeros of them: their gradient inside the group stays."""
    logits = torch.randn(1, 5, 3, 3)
    logits[:, 3:] += 200
    labels = torch.zeros(1, 6, 6, dtype=torch.uint8)
    found = []
    for way, given in ((fast_loss, logits), (loss, logits.double())):
        given = given.requires_grad_()
        terms = way.cross_entropy(given, labels, 3)
        found.append((terms.detach(), torch.autograd.grad(terms.sum(), given)[0].view(1, -1)))
    assert errors(*found).max() < 1e-5, "200 itself is only known to 1e-5"
    assert (found[0][1].view(5, -1)[:3] < 0).all()


def test_a_label_that_is_no_channel():
    for way in (loss, fast_loss):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            way.cross_entropy(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3).byte())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_local_pod_of_half_precision(dtype):
    """Squares beyond its range; the gradient is rounded once."""
    maps, teacher = (300 * torch.rand(2, 3, 9, 7).to(dtype) for _ in "st")
    found = []
    for given in (maps, maps.double()):
        terms = fast_loss.local_pod(given.requires_grad_(), teacher.to(given.dtype))
        found.append((terms.detach().double(), torch.autograd.grad(terms.sum(), given)[0]))
    torch.testing.assert_close(*(terms for terms, _ in found), rtol=1e-6, atol=0)
    got, expected = (gradient for _, gradient in found)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_labels_of_void_and_background_only():
    logits, _, labels, first, _ = make((4, 4), (64, 64))
    for way in (loss, fast_loss):
        for label in (0, VOID):
            expected = way.auxiliary(logits, labels.shape[-2:])
            assert torch.equal(way.mbce(logits, torch.full_like(labels, label), first), expected)


def test_void_is_no_class():
    """A 255th class would be taken for void, and more would wrap around."""
    labels = torch.full((1, 8, 8), VOID, dtype=torch.uint8)
    for way in (loss, fast_loss):
        way.mbce(torch.zeros(1, 254, 2, 2), labels, 1)
        with pytest.raises(AssertionError, match="void"):
            way.mbce(torch.zeros(1, 255, 2, 2), labels, 1)


@pytest.mark.parametrize("sharp", [8, 14, 20])
def test_saturated_scores_are_no_less_exact(sharp):
    """A trained network's logits: float32 stays as close to float64 as the plain formulas do."""
    truth = torch.randint(0, 9, (2, 1, 4, 4))
    logits = torch.full((2, 9, 4, 4), -1.0 * sharp).scatter_(1, truth, sharp)
    logits = (logits + 0.5 * torch.randn_like(logits))[:, :5].requires_grad_()
    teacher = logits.detach() + 0.3 * torch.randn(2, 5, 4, 4)
    labels = F.interpolate(truth.float(), (64, 64))[:, 0].to(torch.uint8)
    for term in TERMS:
        given = (term, logits, teacher, labels, 0, 2.5)
        ours = errors(both(chunked, *given), exact(*given))
        theirs = errors(both(plain, *given), exact(*given))
        for our, their in zip(ours, theirs, strict=True):
            assert our < 2 * max(their, 1e-6)


# ------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_logits(term, dtype):
    """Computed in float32; the gradient is rounded once, behind the loss scale."""
    logits, teacher, *rest = make((4, 4), (64, 64), images=6, dtype=dtype)
    exact = logits.detach().float().requires_grad_()
    for scale in (1, 2.0**16):
        terms = chunked(term, logits, teacher, *rest)
        expected = plain(term, exact, teacher, *rest)
        assert terms.dtype is torch.float32
        torch.testing.assert_close(terms, expected, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(scale * terms.sum(), logits)
        (slope,) = torch.autograd.grad(scale * expected.sum(), exact)
        assert gradient.dtype is dtype
        torch.testing.assert_close(
            gradient, slope.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7
        )
        assert (gradient == slope.to(dtype)).float().mean() > 0.99, "rounded once"
    assert gradient.isfinite().all()
    assert (gradient == 0).sum() <= (slope == 0).sum()


@pytest.mark.parametrize("term", TERMS)
def test_autocast_does_not_reach_in(term):
    given = make((4, 4), (64, 64))
    expected = both(chunked, term, *given)
    with torch.autocast("cpu", torch.bfloat16):
        got = both(chunked, term, *given)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


# ------------------------------------------------------------------------- what is not computed
@pytest.mark.parametrize("term", TERMS)
def test_no_gradient_no_work(term, monkeypatch):
    monkeypatch.setattr(Bilinear, "adjoint", None)
    monkeypatch.setattr(Rows, "add_adjoint", None)
    logits, *rest = make((4, 4), (64, 64))
    with torch.no_grad():
        terms = chunked(term, logits, *rest)
    assert not terms.requires_grad
    assert not chunked(term, logits.detach(), *rest).requires_grad
    torch.testing.assert_close(terms, plain(term, logits.detach(), *rest))


class Memory(TorchDispatchMode):
    """Bytes of the tensors made inside: `peak` of all that live at a time, `largest` of one."""

    def __init__(self):
        super().__init__()
        self.living, self.peak, self.largest = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                self.living[storage] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.living.values()))
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def memory(function, classes, small, size, terms=SIGMOID):
    logits, teacher, labels, *rest = make(small, size, classes)
    labels = labels.short()  # room for any number of classes
    with Memory() as used:
        for term in terms:
            function(term, logits, teacher, labels, *rest).sum().backward()
    return used


def test_memory_does_not_grow_with_classes_at_full_resolution(planes):
    """From 21 to 1001 classes only what has h×w grows, a 256th of full resolution."""
    small, size = (4, 4), (64, 64)
    planes(8, size)
    counts = (21, 151, 1001)
    used = [memory(chunked, classes, small, size) for classes in counts]
    chunk = 8 * 64 * 64 * 4
    assert used[0].largest == used[1].largest == used[2].largest == 3 * chunk
    for classes, one in zip(counts, used, strict=True):
        assert one.peak < 6 * chunk + 8 * (2 * classes * 4 * 4 * 4)


@pytest.mark.slow
def test_memory_of_bands(planes):
    """Of one image h×W; at full resolution a band, or one row where that is more."""
    small, size = (4, 4), (256, 64)
    planes(8, (64, 64))
    for classes in (21, 151, 1001):
        logits = make(small, size, classes)[0]
        row = classes * 64 * 4
        band = bands(logits, size)[0].stop * row
        assert band <= max(8 * 64 * 64 * 4, row)
        used = memory(chunked, classes, small, size, ("unbiased ce", "unbiased kd"))
        assert used.largest <= max(band, 4 * row)
        assert used.peak < 4 * band + 4 * 4 * row, "of 256 rows"


@pytest.mark.slow
def test_memory_next_to_the_plain_loss():
    """At the sizes of training a sixth is the least that is asked."""
    small, size = (16, 16), (256, 256)
    assert memory(chunked, 110, small, size).peak < memory(plain, 110, small, size).peak / 6


# ------------------------------------------------------------------------------------ prediction
def plain_predict(logits, size):
    score, channel = upsample(logits, size)[:, 1:].sigmoid().max(dim=1)
    return torch.where(score > THRESHOLD, channel + 1, 0)


@pytest.mark.parametrize("scale", [1, 6, 40])
@pytest.mark.parametrize(("small", "size"), SIZES)
@pytest.mark.parametrize("count", [0.4, 1, 3, 5, 100])
def test_prediction_equals_the_plain_one_in_every_pixel(scale, small, size, count, planes):
    """Scale 40 saturates: scores that tie at 1 meet across chunks."""
    planes(count, size)
    method = METHODS["dkd"](Task("voc", "own", "overlap", 0, ((1,),), ("a", "b")), {})
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = (scale * torch.randn(2, 9, *small) - scale / 2).to(dtype)
        before = logits.clone()
        preds = method.predict(ModelOutput(logits), size)
        assert preds.dtype is torch.int64
        assert torch.equal(preds, plain_predict(logits, size))
        assert torch.equal(logits, before)


def test_prediction_without_a_size():
    method = METHODS["dkd"](Task("voc", "own", "overlap", 0, ((1,),), ("a", "b")), {})
    logits = torch.randn(2, 5, 6, 7)
    assert torch.equal(method.predict(ModelOutput(logits)), plain_predict(logits, (6, 7)))


def test_prediction_holds_no_full_size_classes(planes):
    planes(8, (64, 64))
    method = METHODS["dkd"](Task("voc", "own", "overlap", 0, ((1,),), ("a", "b")), {})
    peaks = []
    for classes in (21, 1001):
        logits = torch.randn(1, 1 + classes, 4, 4)
        with Memory() as used:
            method.predict(ModelOutput(logits), (64, 64))
        peaks.append(used.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("scale", [1, 40])
@pytest.mark.parametrize(("small", "size"), SIZES)
@pytest.mark.parametrize("count", [0.4, 1, 3, 5, 100])
def test_prediction_of_a_softmax(scale, small, size, count, planes):
    """The channels of the plain way, but where two logits differ by a rounding only.

    `F.interpolate` itself rounds the last digit by how many channels it is given.
    """
    planes(count, size)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = (scale * torch.randn(2, 9, *small) - scale).to(dtype)
        plain = upsample(logits, size)
        rounding = 4 * torch.finfo(plain.dtype).eps * plain.abs().max()
        for first, (value, channel) in (
            (0, highest_logit(logits, size)),
            (1, softmax_score(logits, size)),
        ):
            (best, second), (winner, _) = (x.unbind(1) for x in plain[:, first:].topk(2, dim=1))
            assert torch.equal(channel, first + winner) or (
                (best - second)[channel != first + winner].max() < rounding
            )
            if first:
                best = (best - plain.logsumexp(1)).exp()
            torch.testing.assert_close(value, best, rtol=1e-5, atol=rounding.item())


@pytest.mark.parametrize("count", [0.4, 1, 3, 100])
def test_of_equal_logits_the_first_wins(count, planes):
    planes(count, (8, 8))
    logits = torch.tensor([2.0, 1, 3, 3, 3, 0]).view(1, 6, 1, 1).expand(2, -1, 2, 2)
    for function in (highest_logit, softmax_score):
        assert (function(logits, (8, 8))[1] == 2).all()
    score, channel = softmax_score(logits[:, :2] + torch.tensor([200.0, 0])[:, None, None], (8, 8))
    assert (score == 0).all(), "as sure as the background is"
    assert (channel == 1).all()
