"""Losses, schedules, metrics and transforms against the golden values of the reference."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from base.task import Task
from data_loader.transforms import (
    EvalTransform,
    TrainTransform,
    normalize,
    resized_crop,
)
from models.fast.losses import auxiliary, distillation, mbce
from scripts.benchmarking.definitions import by_definition
from trainer.evaluation import build_evaluators
from utils.lr_scheduler import PolyLR, WarmupPolyLR
from utils.metric import METRICS, ConfusionMatrix, Evaluator
from utils.parse_config import ConfigParser

OLD, NEW = slice(1, 6), slice(6, 9)


def tensor(array):
    return torch.from_numpy(array)


@pytest.fixture(params=["definition", "chunks"])
def way(request):
    """Every way to compute the losses."""
    with by_definition() if request.param == "definition" else nullcontext():
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pos_weight", [1, 2, 35])
def test_mbce(pieces, pos_weight):
    logits, labels = tensor(pieces["loss_logit"]), tensor(pieces["loss_label"])
    loss = mbce(logits[:, NEW], labels, NEW.start, pos_weight)
    torch.testing.assert_close(loss, tensor(pieces[f"loss_mbce_pw{pos_weight}"]))


@pytest.mark.usefixtures("way")
def test_mbce_void_is_a_target_of_zero(pieces):
    """Reference quirk: pixels labelled 255 push every class down, as background does."""
    logits = tensor(pieces["loss_logit"])[:, NEW]
    labels = tensor(pieces["loss_label"])
    assert (labels == 255).any()
    as_background = torch.where(labels == 255, 0, labels)
    assert torch.equal(mbce(logits, labels, 6), mbce(logits, as_background, 6))


@pytest.mark.usefixtures("way")
def test_distillation(pieces):
    logits, teacher = tensor(pieces["loss_logit"]), tensor(pieces["loss_logit_old"])
    teacher.requires_grad_()
    loss = distillation(logits[:, OLD], teacher[:, OLD])
    torch.testing.assert_close(loss, tensor(pieces["loss_kd"]))
    assert not loss.requires_grad, "the teacher carries no gradient"


@pytest.mark.usefixtures("way")
def test_auxiliary(pieces):
    logits = tensor(pieces["loss_logit"])
    torch.testing.assert_close(auxiliary(logits[:, :1]), tensor(pieces["loss_ac"]))


@pytest.mark.parametrize(
    ("cls", "args", "key"),
    [(PolyLR, {}, "lr_poly"), (WarmupPolyLR, {"warmup_iters": 0.2}, "lr_warmup_poly_0.2")],
)
def test_learning_rates(pieces, cls, args, key):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = cls(optimizer, max_iters=40, **args)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, pieces[key], rtol=1e-9)


@pytest.mark.parametrize("warmup", [None, 0, 0.5])
def test_learning_rates_of_other_arguments(warmup):
    """Each group's own, from the first iteration to past the last, and none below `min_lr`."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.01)]
    optimizer = torch.optim.SGD(groups, lr=1)
    given = {"max_iters": 8, "power": 2, "min_lr": 0.004}
    if warmup is None:
        scheduler = PolyLR(optimizer, **given)
    else:
        scheduler = WarmupPolyLR(optimizer, **given, warmup_iters=warmup)
    found, expected = [], []
    for i in range(10):
        found.append([group["lr"] for group in optimizer.param_groups])
        share = min(i / (8 * warmup), 1) if warmup else 1
        factor = (1 - min(i / 8, 1)) ** 2 * (0.001 + 0.999 * share)
        expected.append([max(lr * factor, 0.004) for lr in (1.0, 0.01)])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_schedule_resumes_where_it_stood():
    def make():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        return optimizer, WarmupPolyLR(optimizer, max_iters=40)

    optimizer, scheduler = make()
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    other, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.step(), scheduler.step(), other.step(), resumed.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_confusion_and_metrics(pieces):
    confusion = ConfusionMatrix(9, 9, torch.device("cpu"))
    labels, preds = tensor(pieces["metric_gt"]), tensor(pieces["metric_pred"])
    for i in range(len(labels)):  # in parts, as batches come
        confusion.update(labels[i : i + 1], preds[i : i + 1])
    np.testing.assert_array_equal(confusion.matrix(), pieces["metric_confusion"])
    results = Evaluator(list(METRICS), range(6), range(6, 9)).evaluate(confusion.matrix())
    compared = 0
    for key, expected in pieces.items():
        name, _, group = key.removeprefix("metric_").rpartition("_")
        if group == "class":
            name, group = name.removesuffix("_by"), "by_class"
        if key.startswith("metric_") and name in METRICS:
            # The reference leaves NaN for the accuracy of an absent class; here it is 0.
            np.testing.assert_allclose(results[name][group], np.nan_to_num(expected), rtol=1e-7)
            compared += 1
    assert compared == 3 * 4 + 2


def test_void_pixels_are_not_counted():
    confusion = ConfusionMatrix(3, 3, torch.device("cpu"))
    confusion.update(torch.full((1, 4, 4), 255, dtype=torch.uint8), torch.ones(1, 4, 4).long())
    assert confusion.matrix().sum() == 0


def test_void_of_many_classes_is_the_largest_number_of_its_type():
    """There 255 is a class like any other."""
    confusion = ConfusionMatrix(300, 300, torch.device("cpu"))
    labels = torch.tensor([[[255, 299, torch.iinfo(torch.int32).max]]], dtype=torch.int32)
    confusion.update(labels, torch.tensor([[[255, 0, 0]]]))
    found = confusion.matrix()
    assert found[255, 255] == found[299, 0] == 1
    assert found.sum() == 2


@pytest.mark.parametrize(("old", "new"), [(range(3), ()), ((), range(3))])
def test_one_group_has_only_overall(old, new):
    """At step 0, and in validation without a background."""
    evaluator = Evaluator(["Mean_Intersection_over_Union"], old, new)
    assert evaluator.names() == ["Mean_Intersection_over_Union_overall"]
    results = evaluator.evaluate(np.eye(3))
    assert set(results["Mean_Intersection_over_Union"]) == {"overall", "by_class"}


@pytest.mark.parametrize("background", [True, False])
def test_only_a_background_is_evaluated_as_one(background):
    config = ConfigParser.from_args("train", "configs/config_voc.json", argv=[])
    names = tuple(f"class {number}" for number in range(6))
    steps = ((1, 2, 3), (4, 5)) if background else ((0, 1, 2), (3, 4))
    task = Task("own", "own", "overlap", 1, steps, names, background=background)
    test, validation = build_evaluators(config, task)
    first = [0] if background else []
    assert test.groups["old"] == [*first, 1, 2, 3]
    assert test.groups["new"] == validation.groups.get("new", [4, 5]) == [4, 5]
    assert validation.groups["overall"] == [*first, 4, 5]
    assert ("old" in validation.groups) is background


def test_eval_transform(pieces):
    image, mask = Image.fromarray(pieces["tf_image"]), Image.fromarray(pieces["tf_label"])
    image, label = EvalTransform(32)(image, mask)
    expected = tensor(pieces["tf_eval_image"])
    torch.testing.assert_close(normalize(image[None])[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(label, pieces["tf_eval_label"])


def test_random_crops_may_exceed_the_image():
    """Reference quirk: the scale of the area goes up to 2, so large draws are rejected."""
    assert TrainTransform.scale == (0.5, 2.0)
    image = Image.new("RGB", (100, 100))
    areas = [
        height * width / 1e4
        for _, _, height, width in (
            RandomResizedCrop.get_params(image, list(TrainTransform.scale), [3 / 4, 4 / 3])
            for _ in range(200)
        )
    ]
    assert min(areas) < 0.6
    assert max(areas) <= 1


def test_crop(pieces):
    image, mask = Image.fromarray(pieces["tf_image"]), Image.fromarray(pieces["tf_label"])
    box = tuple(pieces["tf_crop_box"].tolist())
    image, mask = resized_crop(box, (32, 32), image, mask)
    np.testing.assert_array_equal(np.asarray(image), pieces["tf_crop_image"])
    np.testing.assert_array_equal(np.asarray(mask), pieces["tf_crop_label"])
