"""Test images of a report: each beside its truth and what every method sees in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_loader.data_loaders import IncrementalDataLoader
from scripts.predicting.memory import TooLarge
from scripts.predicting.student import Predictor
from scripts.reporting.figures import grouped
from scripts.reporting.results import Run
from scripts.reporting.sections import Group, Section
from trainer.build import build_data
from utils.errors import UserError, listing
from utils.labels import BACKGROUND
from utils.logger import progress
from utils.pictures import colour, palette_image
from utils.ranks import SINGLE

BATCH = 16
CANDIDATES = 60  # test images among which those are chosen that are shown
MOST_COLUMNS = 12  # predictions beside an image; beyond, only those of the last step


@dataclass(frozen=True)
class Column:
    """Whose predictions are shown."""

    label: str
    predictor: Predictor


def add_pictures(
    section: Section,
    task: dict[str, Any],
    count: int,
    device: torch.device,
    data_dir: str | None = None,
) -> None:
    """Add pictures, a legend and how they were chosen to a task's report.

    Weights that are missing or broken cost the columns of their run, a broken image its picture;
    a sentence says so.
    """
    try:
        columns, pair, faults = _columns(section, device, data_dir)
        data = _test_data([*pair, *columns])
        chosen, sentences = choose_images(data, *pair, count)
        shown: set[int] = set()
        for position, reason in chosen.items():
            sample = data.test_set[position]
            maps = {"truth": data.task.to_ids(sample.label.numpy(), unseen=True)}
            for column in columns:
                maps[column.label] = column.predictor.predict(sample.image[None])[0]
            shown.update(*(np.unique(labels).tolist() for labels in maps.values()))
            photo = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
            tiles = [_tile("image", photo, "JPEG")]
            tiles += [_tile(label, palette_image(labels), "PNG") for label, labels in maps.items()]
            task["pictures"].append({"image": sample.name, "why": reason, "tiles": tiles})
    except UserError as error:
        task["pictures"] = []
        task["sentences"]["pictures"] = [f"No pictures: {error}"]
        return
    task["sentences"]["pictures"] = [*sentences, *faults]
    steps = {row["id"]: row["step"] for row in task["classes"]}
    future = sorted({*data.task.ids} - steps.keys())
    task["legend"] = [
        {
            "name": data.task.class_names[label],
            "colour": "#{:02x}{:02x}{:02x}".format(*colour(label)),
            "step": steps.get(label),
        }
        for label in (*steps, *future)
        if label in shown
    ]


def _test_data(columns: Sequence[Column]) -> IncrementalDataLoader:
    """The test images, where the first of the configs says that can be followed."""
    faults = []
    for column in columns:
        try:
            data = build_data(column.predictor.config, SINGLE)
            data.setup("test")
            return data
        except UserError as error:
            faults.append(error)
    raise faults[0]


def _columns(
    section: Section, device: torch.device, data_dir: str | None
) -> tuple[list[Column], tuple[Column, Column], list[str]]:
    """What is shown; the two whose difference chooses the images, the best and the next; a sentence
    for what cannot be shown.

    Of each method, the first run that reaches the last step and whose weights can be loaded.

    Raises:
        UserError: there is none.
    """
    last = section.last
    groups = [group for group in section.groups if group.at(last)]
    steps = range(last + 1) if len(groups) * (last + 1) <= MOST_COLUMNS else range(last, last + 1)

    def column(group: Group, run: Run, step: int) -> Column:
        weights = run.results[step].weights
        if weights is None:
            raise UserError(f"there is no checkpoint-epoch*.pth of {run.results[step].file}.")
        return Column(f"{group.label}, step {step}", Predictor.of(weights, device, data_dir))

    shown: list[tuple[Group, Run, list[Column]]] = []
    faults: list[str] = []
    for group in groups:
        for run in (run for run in group.runs if last in run.results):
            try:
                each = [column(group, run, step) for step in steps if step in run.results]
            except UserError as error:
                faults.append(f"{run.name}: {error}")
            else:
                shown.append((group, run, each))
                break
    if not shown:
        raise UserError(listing(faults, 2))

    def overall(row: tuple[Group, Run, list[Column]]) -> float:
        return grouped(row[1].results[last], section.schedule)["all"] or 0.0

    rivals = [row for row in shown if not row[0].joint] or shown[:1]
    best, *others = sorted(rivals, key=overall, reverse=True)
    pair = best[2][-1], others[0][2][-1] if others else best[2][0]
    columns = [column for _, _, each in shown for column in each]
    return columns, pair, [f"No pictures of {text}" for text in faults]


def choose_images(
    data: IncrementalDataLoader, first: Column, second: Column, count: int
) -> tuple[dict[int, str], list[str]]:
    """Test images in which one gains and loses most against another, then those with many classes.

    Those that are broken, or too large for the memory, are named and left out.

    Returns:
        Position → why it was chosen, and sentences that say how they all were.

    Raises:
        UserError: none can be read.
    """
    gains, classes, faults = _gains(data, first.predictor, second.predictor)
    if not gains:
        raise faults[0]
    by_gain = sorted(gains, key=lambda position: -gains[position])
    each = 0 if first is second else min(max(1, count // 3), count // 2)
    chosen: dict[int, str] = {}
    for position in [*by_gain[:each], *by_gain[::-1][:each]]:
        verb = "gains" if gains[position] >= 0 else "loses"
        points = f"{abs(gains[position]):.1f} points against {second.label}"
        chosen[position] = f"{first.label}, {verb} {points}"
    shown: set[int] = set().union(*(classes[position] for position in chosen))
    while len(chosen) < min(count, len(gains)):
        left = [position for position in gains if position not in chosen]
        best = max(left, key=lambda position: (len(classes[position] - shown), -position))
        chosen[best] = "shows further classes" if classes[best] - shown else ""
        shown |= classes[best]
    how = [f"Of {len(gains)} test images, evenly spread over the list:"]
    if each:
        how.append(
            f"those in which {first.label} gains and loses most against {second.label} (mean IoU "
            "of the classes of the image), then"
        )
    sentences = [" ".join([*how, "those that show most classes."])]
    if faults:
        sentences.append(f"{len(faults)} more cannot be read; the first: {faults[0]}")
    return chosen, sentences


def _gains(
    data: IncrementalDataLoader, first: Predictor, second: Predictor
) -> tuple[dict[int, float], dict[int, set[int]], list[UserError]]:
    """Position → points of IoU that `first` is above `second`, position → classes of the image, and
    what cannot be read.
    """
    images, ids = data.test_set, data.task.label_ids()
    spread = np.linspace(0, len(images) - 1, min(CANDIDATES, len(images))).astype(int).tolist()
    size = BATCH if data.fixed_size("test") else 1  # images of one size are a batch
    gains: dict[int, float] = {}
    classes: dict[int, set[int]] = {}
    faults: list[UserError] = []
    for start in progress(range(0, len(spread), size), desc="choosing pictures", unit="batch"):
        samples = {}
        for position in spread[start : start + size]:
            try:
                samples[position] = images[position]
            except UserError as error:
                faults.append(error)
        if not samples:
            continue
        pixels = torch.stack([sample.image for sample in samples.values()])
        try:
            preds = [predictor.predict(pixels) for predictor in (first, second)]
        except TooLarge as error:
            names = listing(sample.name for sample in samples.values())
            faults.append(UserError(f"{names}: {error}"))
            continue
        for (position, sample), ours, others in zip(samples.items(), *preds, strict=True):
            truth = sample.label.numpy()
            known = truth < len(ids)
            labels = ids[truth[known]]
            classes[position] = {*np.unique(truth[known]).tolist()} - {BACKGROUND}
            gains[position] = _agreement(labels, ours[known]) - _agreement(labels, others[known])
    return gains, classes, faults


def _agreement(truth: np.ndarray, preds: np.ndarray) -> float:
    """Mean IoU in percent over the label ids of the truth, both [pixels]."""
    values = [
        ((truth == label) & (preds == label)).sum() / ((truth == label) | (preds == label)).sum()
        for label in np.unique(truth)
    ]
    return 100 * float(np.mean(values)) if values else 0.0


def _tile(label: str, picture: Image.Image, kind: str) -> dict[str, Any]:
    """A picture as a data URI; JPEG for photographs, PNG for label maps."""
    file = io.BytesIO()
    picture.save(file, format=kind, quality=88, optimize=True)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    size = {"width": picture.width, "height": picture.height}
    return {"label": label, "src": source, "is_map": kind == "PNG", **size}
