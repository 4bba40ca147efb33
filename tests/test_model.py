"""Model: names, outputs, frozen parts, heads, strict loading."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from base.base_model import HeadPlan
from models.backbone import BACKBONES
from models.folding import fold_for_inference, fold_for_training
from models.heads import Heads, make_head, start_head
from models.model import DeepLabV3
from models.weights import load_imagenet, load_previous_step, load_strict
from tests.helpers import DATA, dkd_heads
from utils.errors import UserError


def tiny(sizes=(1, 3), **kwargs):
    return DeepLabV3(dkd_heads(*sizes), backbone="tiny", **kwargs)


def test_state_dict_names_of_released_weights():
    names = DeepLabV3(dkd_heads(1, 15, 1)).state_dict().keys()
    assert len(names) == 672
    for name in (
        "backbone.conv1.weight",
        "backbone.layer1.0.downsample.0.weight",
        "backbone.layer3.22.bn3.running_var",
        "aspp.convs.0.0.weight",
        "aspp.convs.0.1.running_mean",
        "aspp.convs.4.1.weight",
        "aspp.convs.4.2.bias",
        "aspp.project.0.weight",
        "aspp.project.1.num_batches_tracked",
        "aspp.last_conv.0.weight",
        "aspp.last_conv.1.weight",
        "cls.0.weight",
        "cls.2.bias",
    ):
        assert name in names
    assert not any(name.startswith("backbone.fc") for name in names)


@pytest.mark.parametrize(
    ("backbone", "stride"),
    [("resnet50", 8), ("resnet101", 16), ("resnet152", 16), ("tiny", 8), ("tiny", 16)],
)
def test_output_stride(backbone, stride):
    model = DeepLabV3(dkd_heads(1, 2), backbone=backbone, output_stride=stride).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, 3, 65, 97))
    assert out.logits.shape == (1, 3, -(-65 // stride), -(-97 // stride))
    assert out.pos is None
    assert out.neg is None


def test_positive_negative_and_bias_make_the_logit():
    model = tiny((1, 4, 2)).eval()
    with torch.inference_mode():
        out = model(torch.randn(2, 3, 64, 64), {"pos_neg"})
    bias = torch.cat([head.bias for head in list(model.cls)[1:]]).view(1, -1, 1, 1)
    assert out.pos.shape == out.neg.shape == (2, 6, 4, 4)
    assert out.pos.min() >= 0
    assert out.neg.max() <= 0
    torch.testing.assert_close(out.pos + out.neg + bias, out.logits[:, 1:])


def test_auxiliary_head_does_not_shape_the_features():
    model = tiny().train()
    out = model(torch.randn(2, 3, 64, 64))
    out.logits[:, 0].sum().backward()
    assert model.cls[0].weight.grad.abs().sum() > 0
    assert model.aspp.last_conv[0].weight.grad.abs().sum() == 0


# ------------------------------------------------------------------------------- outputs by name
def test_only_what_is_wanted_is_returned():
    model = tiny().eval()
    fields = {"pos_neg": {"pos", "neg"}}
    for wants in ((), ("pos_neg",), ["stages"], {"features"}, frozenset({"stages", "features"})):
        out = model(torch.randn(1, 3, 64, 64), wants)._asdict()
        expected = {"logits"}.union(*(fields.get(name, {name}) for name in wants))
        assert {name for name, value in out.items() if value is not None} == expected


def test_outputs_that_a_model_has_not():
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(AssertionError, match="outputs are"):
        tiny().eval()(images, {"stage"})
    with pytest.raises(ValueError, match="'unknown' is wanted, but the plan"):
        tiny().eval()(images, {"unknown"})
    for plan in (HeadPlan((1, 3)), HeadPlan((1, 3), kind="block", detached_first=True)):
        with pytest.raises(ValueError, match="'pos_neg' decomposes the logits of 1×1 heads"):
            DeepLabV3(plan, backbone="tiny").eval()(images, {"pos_neg"})


def plain_resnet(net, images):
    """Features and stages of a ResNet, written out without anything in place."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(images))), 3, 2, 1)
    stages = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in layer:
            y = F.relu(block.bn1(block.conv1(x)))
            y = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(y)))))
            before = y + (x if block.downsample is None else block.downsample(x))
            x = F.relu(before)
        stages.append(before)
    return x, stages


@pytest.mark.parametrize("backbone", ["tiny", "resnet50"])
@pytest.mark.parametrize("folded", [False, True])
def test_stages_are_the_maps_before_the_last_relu(backbone, folded):
    model = DeepLabV3(dkd_heads(1, 3), backbone=backbone, freeze_all_bn=True, dropout=False)
    if folded:
        fold_for_training(model)
    images = torch.randn(2, 3, 65, 97)
    features, stages = plain_resnet(model.train().backbone, images)
    out = model(images, {"stages"})
    assert len(out.stages) == 4
    for got, expected in zip(out.stages, stages, strict=True):
        assert torch.equal(got, expected)
        assert got.min() < 0
    assert torch.equal(model.backbone(images)[0], features)
    assert torch.equal(model(images).logits, out.logits), "wanting stages changes nothing else"


def test_stages_carry_gradients():
    model = tiny(freeze_all_bn=True).train()
    stages = model(torch.randn(2, 3, 64, 64), {"stages"}).stages
    reached = []
    for stage in stages:
        (gradient,) = torch.autograd.grad(stage.sum(), model.backbone.conv1.weight, None, True)
        reached.append(gradient.abs().sum().item() > 0)
    assert reached == [True] * 4


# ----------------------------------------------------------------------------------------- heads
def test_softmax_layout_is_not_detached():
    """The first head, a background class there, shapes the features as the others do."""
    model = DeepLabV3(HeadPlan((1, 3)), backbone="tiny").train()
    out = model(torch.randn(2, 3, 64, 64), {"features"})
    assert out.logits.shape == (2, 4, 4, 4)
    assert out.features.shape == (2, 64, 4, 4)
    by_head = torch.cat([head(out.features) for head in model.cls], dim=1)
    torch.testing.assert_close(out.logits, by_head)
    out.logits[:, 0].sum().backward()
    assert model.aspp.last_conv[0].weight.grad.abs().sum() > 0


BLOCKS = HeadPlan((1, 3, 2), kind="block", unknown=True)


@pytest.mark.parametrize("detached", [False, True])
def test_block_heads_and_an_unknown_one(detached):
    plan = HeadPlan((1, 3, 2), "block", detached, unknown=True)
    model = DeepLabV3(plan, backbone="tiny", dropout=False)
    own = [name for name in model.state_dict() if not name.startswith("backbone.")]
    block = ["0.weight", *(f"1.{name}" for name in nn.BatchNorm2d(1).state_dict())]
    block += ["3.weight", "3.bias"]
    heads = [f"{head}.{name}" for head in ("cls.0", "cls.1", "cls.2", "unknown") for name in block]
    assert [name for name in own if not name.startswith("aspp.")] == heads
    assert not any(name.startswith("aspp.last_conv") for name in own), "it lives in each head"
    out = model.train()(torch.randn(2, 3, 64, 64), {"unknown", "features"})
    assert out.logits.shape == (2, 6, 4, 4)
    assert out.unknown.shape == (2, 1, 4, 4)
    by_head = torch.cat([head(out.features) for head in model.cls], dim=1)
    torch.testing.assert_close(out.logits, by_head)
    torch.testing.assert_close(out.unknown, model.unknown(out.features))
    out.logits[:, 0].sum().backward()
    shaped = model.aspp.project[0].weight.grad.abs().sum() > 0
    assert shaped != detached
    for head in (*model.cls, model.unknown):  # Kaiming-normal, as every convolution of the ASPP
        assert head[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_parts_hold_every_parameter_once():
    for plan in (dkd_heads(1, 3, 2), BLOCKS):
        model = DeepLabV3(plan, backbone="tiny")
        parts = model.parts()
        modules = [parts.backbone, parts.decoder, *parts.heads]
        modules += [parts.unknown] if plan.unknown else []
        held = [id(p) for module in modules for p in module.parameters()]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert parts.heads == tuple(model.cls)


def test_plan_of_the_step_before():
    assert BLOCKS.previous() == HeadPlan((1, 3), kind="block", unknown=True)
    assert dkd_heads(1, 3, 2).previous() == dkd_heads(1, 3)
    with pytest.raises(AssertionError, match="not 'linear'"):
        HeadPlan((1,), kind="linear")


def test_previous_step_of_block_heads():
    old = DeepLabV3(BLOCKS.previous(), backbone="tiny")
    new = DeepLabV3(BLOCKS, backbone="tiny")
    fresh = {name: value.clone() for name, value in new.cls[2].state_dict().items()}
    load_previous_step(new, old.state_dict(), 2, "step 0")
    assert torch.equal(new.unknown[0].weight, old.unknown[0].weight)
    assert torch.equal(new.cls[1][0].weight, old.cls[1][0].weight)
    assert all(torch.equal(value, fresh[name]) for name, value in new.cls[2].state_dict().items())
    with pytest.raises(UserError, match=r"already has cls\.2\.0\.weight"):
        load_previous_step(new, new.state_dict(), 2, "step 1")
    without = {k: v for k, v in old.state_dict().items() if not k.startswith("unknown.")}
    with pytest.raises(UserError, match=r"step 0 does not fit.*missing: unknown\.0\.weight"):
        load_previous_step(new, without, 2, "step 0")


def test_frozen_bn_of_block_heads():
    """Neither trained nor folded: a method may read and change its heads at any time."""
    model = DeepLabV3(BLOCKS, backbone="tiny", freeze_all_bn=True, dropout=False).train()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images, {"unknown"})
    for change in (fold_for_training, fold_for_inference):
        other = deepcopy(model)
        change(other)
        for head in (*other.cls, other.unknown):
            assert type(head[0]) is nn.Conv2d
            assert type(head[1]) is nn.BatchNorm2d
            assert not head[1].training
            assert not head[1].weight.requires_grad
        assert not any(type(m) is nn.BatchNorm2d for m in other.aspp.modules())
        got = other(images, {"unknown"})
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.unknown, expected.unknown, rtol=1e-4, atol=1e-4)


def test_new_block_head_starts_from_the_unknown_one():
    """Golden: SSUL's head, and what its published code makes of it for three new classes."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(DATA / "ssul_head.npz").items()}
    names = {"0.weight": "conv", "1.weight": "bn_weight", "1.bias": "bn_bias"}
    names |= {"1.running_mean": "bn_mean", "1.running_var": "bn_var"}
    names |= {"3.weight": "cls_weight", "3.bias": "cls_bias"}
    unknown = make_head(4, 1, "block")
    state = {name: golden[f"ssul_head_{key}"] for name, key in names.items()}
    load_strict(unknown, state, "the golden head", may_miss=["1.num_batches_tracked"])
    heads = Heads(4, HeadPlan((1, 3), kind="block")).eval()
    start_head(heads[1], unknown)
    for name, key in names.items():
        assert torch.equal(heads[1].state_dict()[name], golden[f"ssul_head_new_{key}"])
    output = heads(golden["ssul_head_feature"])[:, 1:]
    torch.testing.assert_close(output, golden["ssul_head_new_output"], rtol=1e-5, atol=1e-6)


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_b" in k}


def test_frozen_bn_stays_frozen():
    model = tiny(freeze_all_bn=True).eval().train()
    before = statistics(model)
    model(torch.randn(4, 3, 64, 64))
    assert before
    assert all(torch.equal(before[k], v) for k, v in statistics(model).items())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_unfrozen_bn_learns_its_statistics():
    model = tiny().train()
    before = statistics(model)
    model(torch.randn(4, 3, 64, 64))
    assert not any(torch.equal(before[k], v) for k, v in statistics(model).items())


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_switch(dropout):
    model = tiny(dropout=dropout, freeze_all_bn=True).train()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x).logits, model(x).logits) is not dropout


def test_bn_momentum_of_the_backbone():
    model = tiny()
    momenta = {
        part: {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)}
        for part, module in (("backbone", model.backbone), ("aspp", model.aspp))
    }
    assert momenta == {"backbone": {0.01}, "aspp": {0.1}}


def test_synchronised_bn_keeps_names_and_frozen_parts():
    """What several GPUs train: the same weight file, and `train()` that respects frozen BN."""
    plain = tiny(freeze_all_bn=True)
    names = list(plain.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert list(model.state_dict()) == names
    norms = [m for m in model.train().modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert {norm.momentum for norm in norms} == {0.01, 0.1}
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_new_head_starts_from_the_auxiliary_one():
    model = tiny((1, 3, 2))
    start_head(model.cls[2], model.cls[0])
    for row in range(2):
        assert torch.equal(model.cls[2].weight[row], model.cls[0].weight[0])
        assert torch.equal(model.cls[2].bias[row], model.cls[0].bias[0])


def test_strict_loading_lists_every_fault():
    model, state = tiny(), tiny().state_dict()
    del state["cls.1.bias"]
    state["surplus"] = torch.zeros(1)
    state["cls.1.weight"] = torch.zeros(9, 64, 1, 1)
    with pytest.raises(UserError) as caught:
        load_strict(model, state, "the file")
    message = str(caught.value)
    assert "missing: cls.1.bias" in message
    assert "unexpected: surplus" in message
    assert "wrongly shaped: cls.1.weight [9, 64, 1, 1] instead of [3, 64, 1, 1]" in message


def test_prefix_of_distributed_training_is_cut():
    source, target = tiny(), tiny()
    load_strict(target, {f"module.{k}": v for k, v in source.state_dict().items()}, "x")
    assert torch.equal(source.cls[1].weight, target.cls[1].weight)


def test_previous_step_fills_all_but_the_new_head():
    old, new = tiny((1, 3)), tiny((1, 3, 2))
    fresh = new.cls[2].weight.clone()
    load_previous_step(new, old.state_dict(), 2, "step 0")
    assert torch.equal(new.cls[1].weight, old.cls[1].weight)
    assert torch.equal(new.cls[2].weight, fresh)
    with pytest.raises(UserError, match=r"already has cls\.2"):
        load_previous_step(new, new.state_dict(), 2, "step 1")
    with pytest.raises(UserError, match=r"missing: cls\.1\.bias, cls\.1\.weight"):
        load_previous_step(tiny((1, 3, 2)), tiny((1,)).state_dict(), 2, "step 0")


def test_imagenet_weights_from_a_file(tmp_path):
    """A file as torchvision ships it: with `fc`, without batch counters."""
    spec = BACKBONES["resnet50"]
    source = spec.build(16).state_dict()
    old_style = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    file = tmp_path / "resnet50.pth"
    torch.save({**old_style, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1)}, file)
    model = DeepLabV3(dkd_heads(1, 2), backbone="resnet50", backbone_pretrained=str(file))
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], source[name]) for name in old_style)
    torch.save(dict(list(old_style.items())[5:]), file)
    with pytest.raises(UserError, match=r"missing: bn1\.bias"):
        load_imagenet(model.backbone, "resnet50", str(file))
    with pytest.raises(UserError, match="there is no file"):
        load_imagenet(model.backbone, "resnet50", str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("backbone", "stride", "file"),
    [("resnet101", 16, "resnet101-63fe2227.pth"), ("swin_t", 32, "swin_t-704ceda3.pth")],
)
def test_imagenet_download_failure_says_where_to_put_the_file(
    backbone, stride, file, monkeypatch, tmp_path
):
    def fail(*args, **kwargs):
        assert kwargs["weights_only"]
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    arch = {"backbone": backbone, "output_stride": stride, "backbone_pretrained": True}
    with pytest.raises(UserError) as caught:
        DeepLabV3(dkd_heads(1, 2), **arch)
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / file) in message
    assert "arch.args.backbone_pretrained" in message


def test_unsupported_norm_says_why():
    with pytest.raises(UserError, match="use 'bn_sync'"):
        tiny(norm_act="iabn_sync")
