"""Model: names, outputs, frozen parts, heads, strict loading."""

import pytest
import torch
from torch import nn

from models.backbone import BACKBONES
from models.model import DeepLabV3
from models.weights import load_imagenet, load_previous_step, load_strict
from tests.conftest import dkd_heads
from utils.misc import UserError


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
    model.cls.start_from_auxiliary()
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


def test_imagenet_download_failure_says_where_to_put_the_file(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        assert kwargs["weights_only"]
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as caught:
        DeepLabV3(dkd_heads(1, 2), backbone="resnet101", backbone_pretrained=True)
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "resnet101-63fe2227.pth") in message
    assert "arch.args.backbone_pretrained" in message


def test_unsupported_norm_says_why():
    with pytest.raises(UserError, match="use 'bn_sync'"):
        tiny(norm_act="iabn_sync")
