"""Backbones and optimizers beside the published ones: whole runs of DKD, weight files, shapes.

A new backbone is one class and one registry entry, here as there.
"""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import StochasticDepth

from models.backbone import BACKBONES, BackboneSpec, Swin
from models.model import DeepLabV3
from models.weights import load_imagenet
from tests.helpers import dkd_heads, evaluation, train, write_config
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.errors import UserError


class ThreeConvolutions(nn.Module):
    """The smallest thing that may stand as a backbone; its stages need not differ."""

    def __init__(self, output_stride):
        super().__init__()
        strides = (2, 2, output_stride // 4)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, 8, 3, stride, padding=1)
            for inputs, stride in zip((3, 8, 8), strides, strict=True)
        )

    def forward(self, images, with_stages=False):
        x, stages = images, []
        for conv in self.convs:
            stages.append(conv(x))
            x = stages[-1].relu()
        return x, (*stages, stages[-1]) if with_stages else ()


def small_swin():
    return SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 1, 2, 2], [3, 3], stochastic_depth_prob=0.3)


OWN = {
    "own_swin": BackboneSpec(
        lambda stride: Swin(small_swin()), 64, 16, strides=(32,), dropped=("head.",)
    ),
    "three_convolutions": BackboneSpec(ThreeConvolutions, 8, 16),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for name, spec in OWN.items():
        monkeypatch.setitem(BACKBONES, name, spec)


def network(name="own_swin", stride=32, **kwargs):
    return DeepLabV3(dkd_heads(1, 3), backbone=name, output_stride=stride, **kwargs)


# ------------------------------------------------------------------------------------ whole runs
SGD = {"type": "SGD", "args": {"lr": 0.001}}
ADAMW = {"type": "AdamW", "args": {"lr": 0.001, "betas": [0.9, 0.99], "eps": 1e-7}}


def stop_in_the_second(self, epoch, whole=Trainer.train_epoch):
    if epoch == 2:
        raise KeyboardInterrupt
    whole(self, epoch)


@pytest.mark.parametrize(
    ("backbone", "stride", "optimizer"),
    [
        pytest.param("own_swin", 32, SGD, marks=pytest.mark.slow),
        pytest.param("own_swin", 32, ADAMW, marks=pytest.mark.slow),
        pytest.param("tiny", 16, ADAMW, marks=pytest.mark.slow),
        ("three_convolutions", 16, SGD),
    ],
    ids=["swin", "swin-adamw", "tiny-adamw", "convolutions"],
)
def test_dkd_trains_resumes_and_evaluates(
    backbone, stride, optimizer, toy_root, tmp_path, monkeypatch
):
    """Both steps, with replay; stopped after the first epoch and resumed: the same bits."""
    config = write_config(tmp_path / "own.json", toy_root)
    tree = json.loads(config.read_text())
    tree["arch"]["args"] |= {"backbone": backbone, "output_stride": stride}
    tree["data_loader"]["args"]["train"]["args"]["transform_args"]["crop_size"] = 64
    tree["optimizer"] = optimizer
    config.write_text(json.dumps(tree))
    for step, flags in ((0, ()), (1, ("--freeze_bn", "--mem_size", "6"))):
        flags = (*flags, "--task_step", str(step))
        whole = train(config, *flags)
        parts = ("--save_dir", str(tmp_path / "parts"))
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_epoch", stop_in_the_second)
            with pytest.raises(KeyboardInterrupt):
                train(config, *flags, *parts)
        torch.manual_seed(123)  # whatever the process did before must not matter
        resumed = train(config, *flags, *parts, "-r", "auto")
        first, second = (
            files.load(run.step_dir() / "checkpoint-epoch2.pth") for run in (whole, resumed)
        )
        assert first["state_dict"].keys() == second["state_dict"].keys()
        for name, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][name]), name
        assert metrics(whole)["confusion"] == metrics(resumed)["confusion"]
    kept = {name for state in first["optimizer"]["state"].values() for name in state}
    averages = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
    assert kept == averages[optimizer["type"]]
    weights = str(whole.step_dir() / "checkpoint-epoch2.pth")
    again = train(None, "-r", weights, "--save_dir", str(tmp_path / "again"), mode="eval")
    assert evaluation(again)["confusion"] == metrics(whole)["confusion"]


def metrics(run):
    return json.loads((run.log_dir() / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------ Swin
def torchvision_stages(net, images):
    """Outputs of torchvision's stages by hooks, and its last map, as [N, channels, h, w]."""
    stages = []
    for number in (1, 3, 5, 7):
        net.features[number].register_forward_hook(lambda *given: stages.append(given[2]))
    last = net.norm(net.features(images))
    return [stage.permute(0, 3, 1, 2) for stage in (*stages, last)]


def test_swin_is_torchvisions():
    """Where the sides divide, to the bit; a step's dropout switch decides on random depth."""
    net = small_swin().eval()
    model = network(dropout=False)
    names = {name for name in net.state_dict() if not name.startswith("head.")}
    assert model.backbone.state_dict().keys() == names
    model.backbone.load_state_dict({name: net.state_dict()[name] for name in names})
    images = torch.randn(2, 3, 64, 96)
    *stages, last = torchvision_stages(net, images)
    for mode in (True, False):
        features, got = model.train(mode).backbone(images, True)
        assert torch.equal(features, last)
        assert [stage.shape[1] for stage in got] == [8, 16, 32, 64]
        assert all(torch.equal(a, b) for a, b in zip(got, stages, strict=True))
        assert model.backbone(images)[1] == ()


@pytest.mark.parametrize("size", [(65, 97), (48, 48), (31, 64), (33, 2)])
def test_swin_takes_every_size(size):
    """Rounded up as a ResNet does; the last rows and columns are seen."""
    model = network().eval()
    images = torch.randn(1, 3, *size, requires_grad=True)
    out = model(images, {"stages"})
    expected = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(stage.shape[-2:]) for stage in out.stages] == expected
    assert tuple(out.logits.shape[-2:]) == expected[-1]
    out.stages[0].square().sum().backward()
    assert (images.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("dropout", [True, False])
def test_stochastic_depth_is_switched_as_dropout(dropout):
    model = network(dropout=dropout, freeze_all_bn=True).train()
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert any(module.p > 0 for module in depths)
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(model.backbone(images)[0], model.backbone(images)[0]) is not dropout


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_a_swin_lie_as_its_parameters(channels_last):
    """The ASPP's too, whose input comes from [N, h, w, channels]; and stages carry gradients."""
    model = network(freeze_all_bn=True).train()
    images = torch.randn(2, 3, 64, 64)
    if channels_last:
        model.channels_last()
        images = images.to(memory_format=torch.channels_last)
    out = model(images, {"stages", "pos_neg"})
    maps = (out.logits, out.pos, out.neg, *out.stages)
    sum(part.square().mean() for part in maps).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.stride() == parameter.stride(), name
    embedding = model.backbone.features[0][0].weight
    for stage in model(images, {"stages"}).stages:
        (gradient,) = torch.autograd.grad(stage.square().sum(), embedding, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_real_swin_from_torchvisions_file(tmp_path):
    """The classifier is left out, everything else is there; a crop comes out at stride 32."""
    net = models.swin_t()
    torch.save(net.state_dict(), tmp_path / "swin_t.pth")
    model = network("swin_t", backbone_pretrained=str(tmp_path / "swin_t.pth")).eval()
    loaded, source = model.backbone.state_dict(), net.state_dict()
    assert source.keys() - loaded.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(value, source[name]) for name, value in loaded.items())
    with torch.inference_mode():
        out = model(torch.randn(1, 3, 65, 97), {"stages"})
    assert out.logits.shape == (1, 4, 3, 4)
    assert [stage.shape[1] for stage in out.stages] == [96, 192, 384, 768]
    with torch.device("meta"):
        large = BACKBONES["swin_b"].build(32)
    assert large.norm.weight.shape == (BACKBONES["swin_b"].channels,)


# ---------------------------------------------------------------------------------- weight files
def test_only_what_the_entry_names_may_miss(tmp_path):
    """A ResNet's file may lack batch counters and have `fc`; a Swin's has `head`, lacks nothing."""
    path = str(tmp_path / "w.pth")
    load = partial(load_imagenet, network().backbone, "own_swin", path)
    state = small_swin().state_dict()
    torch.save(state, path)
    load()
    for name, says in (
        ("norm.weight", "missing: norm.weight"),
        ("features.1.0.attn.relative_position_index", "missing: features.1.0.attn.relative_pos"),
    ):
        torch.save({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(UserError, match=rf"for arch\.args\.backbone 'own_swin' .*{says}"):
            load()
    torch.save(state | {"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unexpected: fc\.weight"):
        load()


def test_no_published_weights():
    with pytest.raises(UserError, match=r"no ImageNet weights for .* 'own_swin'"):
        network(backbone_pretrained=True)


@pytest.mark.parametrize(("name", "stride", "valid"), [("swin_t", 16, "32"), ("tiny", 32, "8, 16")])
def test_stride_that_a_backbone_does_not_offer(name, stride, valid):
    with pytest.raises(UserError) as caught:
        network(name, stride)
    assert str(caught.value).endswith(f"backbone '{name}' does not offer; valid: {valid}.")
