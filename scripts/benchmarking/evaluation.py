"""The section `eval`: evaluation of decoded images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from base.base_model import BaseModel
from data_loader.dataset import Sample
from data_loader.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from scripts.benchmarking.measure import Row, must_agree, say
from scripts.benchmarking.networks import Net
from scripts.benchmarking.plan import Plan, timed
from utils.labels import VOID


@torch.no_grad()
def plain_evaluate(net: Net, student: BaseModel, samples: Sequence[Sample]) -> np.ndarray:
    """The confusion matrix of images that come one by one, counted on the host."""
    classes = 1 + len(net.task.seen)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    student.eval()
    for sample in samples:
        images = transforms.normalize(
            sample.image.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD)
        )
        with net.autocast("eval_amp"):
            logits = student(images.to(net.device)).logits
        size = sample.label.shape[-2:]
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        scores = logits[0, 1:].sigmoid().cpu().numpy()
        preds = scores.argmax(axis=0) + 1
        preds[scores.max(axis=0) <= 0.5] = 0
        labels = sample.label[0].numpy()
        counted = labels != VOID
        cells = classes * labels[counted].astype(np.int64) + preds[counted]
        confusion += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    return confusion


def measure_eval(plan: Plan) -> list[Row]:
    """Evaluation of images that are decoded already."""
    what, shape = next(iter(plan.shapes.items()))
    say(f"eval: {what}, {plan.backbone}, {plan.crop}²")
    net = Net(shape, plan.backbone, plan.device)
    student, evaluation = copy.deepcopy(net.student), net.evaluation()
    whole = net.batch(2 * plan.batch, plan.crop)
    count = len(whole.name)
    single, batches = (
        [
            Sample(whole.image[i : i + n], whole.label[i : i + n], whole.name[i : i + n])
            for i in range(0, count, n)
        ]
        for n in (1, plan.batch)
    )

    @torch.inference_mode()
    def network_only() -> None:
        for batch in batches:
            with net.autocast("eval_amp"):
                net.student(normalize(batch.image.to(plan.device)))

    def ours() -> np.ndarray:
        with redirect_stderr(StringIO()):  # the progress bar
            return evaluation.evaluate(batches, "test")

    plain = partial(plain_evaluate, net, student, single)
    tolerance = 1e-3 if plan.device.type == "cpu" else 3e-2
    must_agree("eval, confusion matrix", plain(), ours(), tolerance)
    seconds = timed(plan, {"plain": plain, "ours": ours, "limit": network_only})
    rates = {name: count / value for name, value in seconds.items()}
    return [Row("eval", f"{what}, {plan.backbone}", "images/s", **rates)]
