"""Test images of a report: each beside its truth and what every method sees in it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_loader.data_loaders import IncrementalDataLoader
from scripts.predicting.student import Predictor
from scripts.reporting.figures import grouped
from scripts.reporting.results import Run
from scripts.reporting.summary import Group, Section
from trainer.build import build_data
from utils import checkpoint as files
from utils.distributed import SINGLE
from utils.logger import progress
from utils.misc import BACKGROUND, UserError
from utils.pictures import colour, palette_image

BATCH = 16
CANDIDATES = 60  # test images among which those are chosen that are shown
MOST_COLUMNS = 12  # predictions beside an image; beyond, only those of the last step


@dataclass(frozen=True)
class Column:
    """Whose predictions are shown."""

    label: str
    predictor: Predictor


def add_pictures(
    section: Section, task: dict[str, Any], count: int, device: torch.device, data_dir: str | None
) -> None:
    """Add pictures, a legend and how they were chosen to a task's report.

    Without weights or test images there is a sentence that says why.
    """
    try:
        columns, pair = _columns(section, device, data_dir)
        data = build_data(pair[0].predictor.config, SINGLE)
        data.setup("test")
    except UserError as error:
        task["sentences"]["pictures"] = [f"No pictures: {error}"]
        return
    chosen, how = choose(data, *pair, count)
    ids = np.append(data.task.label_ids(unseen=True), np.uint16(data.task.void))
    shown: set[int] = set()
    for position, why in chosen.items():
        sample = data.test_set[position]
        truth = ids[np.minimum(sample.label.numpy(), len(ids) - 1)]
        maps = {"truth": truth}
        for column in columns:
            maps[column.label] = column.predictor.predict(sample.image[None])[0]
        shown |= {int(label) for labels in maps.values() for label in np.unique(labels)}
        photo = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        tiles = [_tile("image", photo, "JPEG")]
        tiles += [_tile(label, palette_image(labels), "PNG") for label, labels in maps.items()]
        task["pictures"].append({"image": sample.name, "why": why, "tiles": tiles})
    task["legend"] = [
        {
            "name": row["name"],
            "colour": "#{:02x}{:02x}{:02x}".format(*colour(row["id"])),
            "step": row["step"],
        }
        for row in task["classes"]
        if row["id"] in shown
    ]
    task["sentences"]["pictures"] = [how]


def _columns(
    section: Section, device: torch.device, data_dir: str | None
) -> tuple[list[Column], tuple[Column, Column]]:
    """What is shown, and the two whose difference chooses the images: the best and the next.

    Raises:
        UserError: a step's weights are missing or broken.
    """
    groups = [group for group in section.groups if section.last in group.runs[0].results]
    steps = [*range(section.last + 1)]
    if len(groups) * len(steps) > MOST_COLUMNS:
        steps = [section.last]

    def column(group: Group, run: Run, step: int) -> Column:
        own = run.results[step].step  # joint training shown in another schedule has its own
        weights = files.final_checkpoint(run.step_folder(own))
        if weights is None:
            raise UserError(f"{run.step_folder(own)} holds no checkpoint-epoch*.pth.")
        return Column(f"{group.label}, step {step}", Predictor.of(weights, device, data_dir))

    columns, last = [], {}
    for group in groups:
        run = group.runs[0]
        own = [column(group, run, step) for step in steps if step in run.results]
        columns += own
        last[group.label] = own

    def overall(group: Group) -> float:
        return grouped(group.runs[0].results[section.last], section.schedule)["all"] or 0.0

    ranked = sorted((group for group in groups if not group.joint), key=overall, reverse=True)
    if len(ranked) > 1:
        return columns, (last[ranked[0].label][-1], last[ranked[1].label][-1])
    if not columns:
        raise UserError("no run reaches the last step.")
    return columns, (columns[-1], columns[0])


def choose(
    data: IncrementalDataLoader, first: Column, second: Column, count: int
) -> tuple[dict[int, str], str]:
    """Test images that show what one gains and loses against another, and many classes.

    Returns:
        Position → why it was chosen, and how they all were, in words.
    """
    images, ids = data.test_set, data.task.label_ids()
    spread = np.linspace(0, len(images) - 1, min(CANDIDATES, len(images))).astype(int).tolist()
    # Evaluated in batches where the images come in one size.
    size = BATCH if data.one_size("test") else 1
    gains: dict[int, float] = {}
    classes: dict[int, set[int]] = {}
    for start in progress(range(0, len(spread), size), desc="choosing pictures", unit="batch"):
        positions = spread[start : start + size]
        samples = [images[position] for position in positions]
        pixels = torch.stack([sample.image for sample in samples])
        preds = [column.predictor.predict(pixels) for column in (first, second)]
        for position, sample, mine, theirs in zip(positions, samples, *preds, strict=True):
            truth = sample.label.numpy()
            known = truth < len(ids)
            seen = ids[truth[known]]
            classes[position] = {*np.unique(truth[known]).tolist()} - {BACKGROUND}
            gains[position] = _agreement(seen, mine[known]) - _agreement(seen, theirs[known])
    by_gain = sorted(gains, key=lambda position: -gains[position])
    third = count // 3
    chosen: dict[int, str] = {}
    if first is not second:
        for position in [*by_gain[:third], *by_gain[::-1][:third]]:
            verb = "gains" if gains[position] >= 0 else "loses"
            points = f"{abs(gains[position]):.1f} points against {second.label}"
            chosen[position] = f"{first.label}, {verb} {points}"
    shown: set[int] = set().union(*(classes[position] for position in chosen))
    while len(chosen) < min(count, len(gains)):
        left = [position for position in gains if position not in chosen]
        best = max(left, key=lambda position: (len(classes[position] - shown), -position))
        shown |= classes[best]
        chosen[best] = "shows classes that the others do not"
    how = (
        f"Of {len(gains)} test images, evenly spread over the list: those in which {first.label} "
        f"gains and loses most against {second.label} (mean IoU of the classes of the image), then "
        "those that show most classes."
    )
    return chosen, how


def _agreement(truth: np.ndarray, preds: np.ndarray) -> float:
    """Mean IoU in percent over the label ids of the truth, both [pixels]."""
    found = []
    for label in np.unique(truth):
        mine, theirs = truth == label, preds == label
        found.append((mine & theirs).sum() / (mine | theirs).sum())
    return 100 * float(np.mean(found)) if found else 0.0


def _tile(label: str, picture: Image.Image, kind: str) -> dict[str, Any]:
    """A picture as a data URI; JPEG for photographs, PNG for label maps."""
    file = io.BytesIO()
    picture.save(file, format=kind, quality=88, optimize=True)
    data = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"label": label, "src": data, "full": data, "is_map": kind == "PNG"}
