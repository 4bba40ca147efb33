"""Other methods against golden values of their published code, computed in float32."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from models.fast.losses import cross_entropy, distillation, local_pod, mbce, soft_distillation
from scripts.benchmarking.definitions import by_definition
from tests.helpers import DATA


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "methods.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def assert_gradient(got, expected):
    """Equal to 1e-4 of the largest entry."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------------------------------- losses
@pytest.fixture(params=["definition", "fast way"])
def way(request):
    with by_definition() if request.param == "definition" else nullcontext():
        yield


# Losses of logits z and the golden arrays; `old` channels, background among them.
LOSSES = {
    "ft_loss": lambda z, g, old: cross_entropy(z, g["label"]),
    "lwf_kd": lambda z, g, old: soft_distillation(z[:, :old], g["logit_old"]),
    "lwfmc_bce": lambda z, g, old: mbce(z, g["label"], 0, void_counts=False),
    "lwfmc_kd": lambda z, g, old: distillation(z[:, :old], g["logit_old"]).mean(),
    "mib_unce": lambda z, g, old: cross_entropy(z, g["label"], old),
    "mib_unkd": lambda z, g, old: soft_distillation(z, g["logit_old"]),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", LOSSES)
def test_losses(golden, name):
    logits = golden["logit"].clone().requires_grad_()
    value = LOSSES[name](logits, golden, golden["logit_old"].shape[1]).sum()
    torch.testing.assert_close(value, golden[name].reshape(()), rtol=1e-5, atol=0)
    gradient = golden[f"{name.removesuffix('_loss')}_grad"]
    assert_gradient(torch.autograd.grad(value, logits)[0], gradient)


@pytest.mark.usefixtures("way")
def test_plop_cross_entropy_weighs_images(golden):
    logits = golden["plop_logit"].clone().requires_grad_()
    value = cross_entropy(logits, golden["plop_target"], weight=golden["plop_nu"]).sum()
    torch.testing.assert_close(value, golden["plop_ce"].reshape(()), rtol=1e-5, atol=0)
    assert_gradient(torch.autograd.grad(value, logits)[0], golden["plop_grad_logit"])


@pytest.mark.usefixtures("way")
def test_plop_local_pod(golden):
    """Each map's term and gradient; the sixth is of the logits, whose old ones take in the new."""
    classes, old = golden["logit"].shape[1], golden["logit_old"].shape[1]
    new = int(golden["classes"][-1])
    assert classes - new == old
    maps = [golden[f"plop_map{k}"].clone().requires_grad_() for k in range(1, 6)]
    small = golden["plop_small"].clone().requires_grad_()
    background = small[:, :1] + small[:, old:].sum(1, keepdim=True)
    students = [*maps, torch.cat([background, small[:, 1:old]], 1)]
    teachers = [*(golden[f"plop_map{k}_old"] for k in range(1, 6)), golden["plop_small_old"]]
    scale = (classes / new) ** 0.5
    layers = torch.cat(
        [
            weight * scale * local_pod(student, teacher)
            for weight, student, teacher in zip(
                [0.01] * 5 + [5e-4], students, teachers, strict=True
            )
        ]
    )
    torch.testing.assert_close(layers, golden["plop_pod_layers"].float(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(layers.mean(), [*maps, small])
    names = [*(f"plop_grad_map{k}" for k in range(1, 6)), "plop_grad_small"]
    for gradient, name in zip(gradients, names, strict=True):
        assert_gradient(gradient, golden[name])
