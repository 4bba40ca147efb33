"""The kernel of the losses, run by Triton's interpreter on the CPU, against the definitions.

On a GPU `test_gpu.py` runs it compiled.
"""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models import fused_loss
from models.fast_loss import distillation
from models.upsampling import Bilinear, upsample
from tests.helpers import PROJECT
from tests.losses import TERMS, both, chunked, errors, exact, make
from tests.networks import network, switched
from trainer.build import apply_fast
from utils.logger import log

SIZES = [  # h×w, H×W: output stride 16, odd, no whole multiple, hardly larger, equal, smaller
    ((2, 1), (32, 16)),
    ((2, 2), (17, 17)),
    ((2, 3), (19, 29)),
    ((3, 2), (4, 3)),
    ((3, 2), (3, 2)),
    ((4, 3), (3, 1)),
]


@pytest.fixture
def no_chunks(kernel, monkeypatch):
    monkeypatch.setattr(Bilinear, "up", None)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("small", "size"), SIZES)
def test_loss_and_gradient(no_chunks, term, small, size):
    given = make(small, size, classes=2)
    assert errors(both(chunked, term, *given), exact(term, *given)).max() < 1e-6


@pytest.mark.parametrize("term", ["mbce", "kd"])
def test_more_classes_than_a_program_has(no_chunks, term):
    given = make((1, 1), (4, 7), classes=2 * fused_loss.CLASSES + 1)
    assert errors(both(chunked, term, *given), exact(term, *given)).max() < 1e-6


def test_any_layout_and_part_of_the_channels(no_chunks):
    """Logits are channels of a map that has more, and their channels may be innermost."""
    logits, teacher, *rest = make((2, 3), (5, 6), classes=4, images=1)
    expected = both(chunked, "kd", logits, teacher, *rest)
    for layout in (torch.contiguous_format, torch.channels_last):
        wide = torch.randn(1, 9, 2, 3).to(memory_format=layout)
        wide[:, 3:7] = logits.detach()
        also = torch.randn(1, 9, 2, 3).to(memory_format=layout)
        also[:, 1:5] = teacher
        got = both(chunked, "kd", wide[:, 3:7].requires_grad_(), also[:, 1:5], *rest)
        assert all(map(torch.equal, got, expected))


def test_strided_labels(no_chunks):
    logits, teacher, labels, *rest = make((2, 2), (8, 8), classes=3, images=1)
    strided = labels.repeat_interleave(2, dim=-1)[..., ::2]
    expected = both(chunked, "mbce", logits, teacher, labels, *rest)
    got = both(chunked, "mbce", logits, teacher, strided, *rest)
    assert not strided.is_contiguous()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("sharp", [10, 90])
def test_saturated_scores(no_chunks, sharp):
    """Where one of the two summands of the loss has all the digits."""
    for sign in (-1, 1):
        logits, teacher, *rest = make((1, 1), (8, 16), classes=3)
        logits = (sign * sharp + 0.1 * logits.detach()).requires_grad_()
        for term in TERMS:
            given = (term, logits, logits.detach() + 0.1 * teacher, *rest)
            got, plain = both(chunked, *given), exact(*given)
            torch.testing.assert_close(got[0].double(), plain[0], rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(got[1].double(), plain[1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(no_chunks, dtype):
    """Computed in float32, so equal to the chunks; only the gradient is rounded."""
    logits, teacher, *_ = make((2, 2), (16, 16), classes=3, dtype=dtype)
    got = both(lambda term, x, y: distillation(x, y, (16, 16)), "kd", logits, teacher)
    wide = logits.detach().float().requires_grad_()
    expected = both(lambda term, x, y: distillation(x, y, (16, 16)), "kd", wide, teacher.float())
    assert got[0].dtype is torch.float32
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1].to(dtype))


def test_no_gradient_no_work(no_chunks, monkeypatch):
    logits, *rest = make((2, 2), (16, 16), classes=3)
    given = []
    losses = fused_loss.losses
    monkeypatch.setattr(
        fused_loss,
        "losses",
        lambda *args, **kwargs: given.append(losses(*args, **kwargs)) or given[-1],
    )
    expected = chunked("mbce", logits, *rest).detach()
    with torch.no_grad():
        terms = chunked("mbce", logits, *rest)
    assert torch.equal(terms, expected)
    assert [gradient is None for _, gradient in given] == [False, True]


@pytest.mark.parametrize(
    ("on", "on_gpu", "dtype", "expected"),
    [
        (True, True, torch.float32, True),
        (True, True, torch.bfloat16, True),
        (True, True, torch.float64, False),
        (True, False, torch.float32, False),
        (False, True, torch.float32, False),
    ],
)
def test_what_the_kernel_serves(monkeypatch, on, on_gpu, dtype, expected):
    monkeypatch.setattr(fused_loss, "switched_on", on)
    assert fused_loss.serves(SimpleNamespace(is_cuda=on_gpu, dtype=dtype)) is expected


@pytest.mark.parametrize(
    ("before", "after"), [(1, 7), (2, 32), (3, 33), (32, 512), (33, 513), (5, 5), (7, 3)]
)
def test_cells(before, after):
    """Every pixel is in one cell, between the two logits that it is upsampled from."""
    start, weight, widest = fused_loss.cells(before, after, torch.device("cpu"))
    counts = start.diff()
    assert (start[0], start[-1], len(counts)) == (0, after, before + 1)
    assert counts.max() <= widest < 2 * counts.max()
    cell = torch.repeat_interleave(torch.arange(before + 1), counts)
    values = torch.randn(before)
    near, far = values[(cell - 1).clamp(min=0)], values[cell.clamp(max=before - 1)]
    got = (1 - weight) * near + weight * far
    expected = upsample(values.view(1, 1, 1, -1), (1, after)).flatten()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.fused_kernel import TARGETS, binary_cross_entropy as kernel

for target in TARGETS.values():
    labels = "*u8" if target == TARGETS["labels"] else "*fp16"
    pointers = {"logits": "*fp16", "teacher": "*fp16", "labels": labels, "pos_weight": "fp32"}
    pointers |= dict.fromkeys(("row_starts", "column_starts"), "*i32")
    pointers |= dict.fromkeys(("row_weights", "column_weights", "total", "corners"), "*fp32")
    tile = {"ROWS": 16, "COLUMNS": 16} if target == TARGETS["labels"] else {"ROWS": 1, "COLUMNS": 1}
    constants = {"TARGET": target, "GRADIENT": True, "CLASSES": 8, **tile}
    kinds = pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print(len(binary))
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path):
    """Which needs no GPU; the interpreter is more lenient than the compiler."""
    pytest.importorskip("triton", reason="needs Triton")
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        **{"cwd": PROJECT, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
    assert not done.stderr


@pytest.mark.parametrize("on", [True, False])
def test_the_switch(monkeypatch, caplog, on):
    """Where the kernel cannot run, that is told, and the losses are what they were."""
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(fused_loss, "switched_on", None)
    with caplog.at_level(logging.WARNING, logger=log.name):
        apply_fast(switched(fused_loss=on), network(), trains=True)
    assert fused_loss.switched_on is False
    assert ("computed in chunks" in caplog.text) is on
    monkeypatch.setattr(fused_loss, "fault", lambda device: "")
    apply_fast(switched(fused_loss=not on), network(), trains=False)
    assert fused_loss.switched_on is False, "an evaluation has no losses"
    apply_fast(switched(fused_loss=on), network(), trains=True)
    assert fused_loss.switched_on is on


def test_what_stands_in_its_way(monkeypatch):
    assert fused_loss.fault(torch.device("cpu")) == "the device is cpu"

    def no_compiler(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify CC")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(fused_loss, "losses", no_compiler)
    assert fused_loss.fault(torch.device("cuda")) == "RuntimeError: Failed to find C compiler."
    monkeypatch.setattr(fused_loss, "losses", lambda *args: (zeros(1), None))
    assert fused_loss.fault(torch.device("cuda")) == ""
    monkeypatch.setattr(fused_loss, "losses", lambda *args: (zeros(1) / 0, None))
    assert fused_loss.fault(torch.device("cuda")) == "it gives no number"


def test_shapes_that_do_not_fit_are_never_read(no_chunks):
    logits, teacher, labels, *_ = make((2, 2), (8, 8), classes=3)
    for wrong in ({"teacher": teacher[:, :2]}, {"labels": labels[:1]}):
        with pytest.raises(AssertionError):
            fused_loss.losses(logits, (8, 8), 1.0, True, **wrong)
