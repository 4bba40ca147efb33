"""Compare finished steps: one table of their test results and one picture of their predictions.

    python scripts/compare.py --out comparison.png RUN/step_0 RUN/step_1 OTHER/step_1

Each argument is a step folder below `models/`; its figures come from the `metrics.json` of that
step's test, its predictions from its final checkpoint. Called by `demo.sh`, useful for any runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from base.task import Task
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.transforms import normalize
from models.weights import load_strict
from trainer.build import build_data, build_student
from trainer.methods import METHODS
from utils import checkpoint as files
from utils.config_file import read_json
from utils.distributed import SINGLE
from utils.misc import (
    BACKGROUND,
    PROJECT_ROOT,
    UserError,
    atomic_path,
    one_sentence_errors,
)
from utils.parse_config import ConfigParser
from utils.pictures import voc_palette

METRIC = "Mean_Intersection_over_Union"
COLUMNS = {"old": "old", "new": "new", "harmonic": "hIoU", "overall": "all"}


class Run:
    """A finished step: its configuration, its test results, its model."""

    def __init__(self, folder: Path):
        folder = folder.resolve()
        weights = files.final_checkpoint(folder)
        if weights is None or not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is no folder of a finished step: it must hold config.json and "
                "checkpoint-epoch*.pth."
            )
        default = shipped_config(folder / "config.json")
        self.config = ConfigParser.from_args("eval", default, argv=["-r", str(weights)])
        self.folder, self.weights = folder, weights
        # models/RUN/step_t and log/RUN/step_t lie side by side in the folder of all runs
        self.metrics = folder.parents[2] / "log" / folder.parent.name / folder.name / "metrics.json"
        if not self.metrics.is_file():
            raise UserError(f"{self.metrics} does not exist; test the step first, with --test.")

    @property
    def label(self) -> str:
        """Method and step, for headings."""
        return f"{self.config['name']}, step {self.config['data_loader']['args']['task']['step']}"

    def results(self) -> dict[str, float]:
        """Mean IoU per group in percent."""
        metrics = json.loads(self.metrics.read_text())["metrics"]
        if METRIC not in metrics:
            raise UserError(f"{self.metrics} has no {METRIC}; add it to metrics and test again.")
        return metrics[METRIC]

    def data(self) -> IncrementalDataLoader:
        """Task and test set."""
        return build_data(self.config, SINGLE)

    @torch.inference_mode()
    def predict(self, images: list[torch.Tensor], task: Task) -> list[np.ndarray]:
        """Images [3, H, W] uint8, of any sizes → label ids [H, W], as `Task.label_ids` has them."""
        method = METHODS[self.config["method"]](task, self.config["hyperparameter"])
        model = build_student(self.config, method)
        load_strict(model, files.load(self.weights)["state_dict"], str(self.weights))
        model.eval()
        preds = []
        for image in images:
            _, height, width = image.shape
            output = model(normalize(image[None]), method.answers_from)
            preds.append(method.predict(output, (height, width))[0].numpy())
        return [task.label_ids()[pred] for pred in preds]


def shipped_config(path: Path) -> str:
    """The shipped config of the data set that the config `path` is for."""
    bundle = read_json(path).get("data_loader", {}).get("type")
    for shipped in sorted((PROJECT_ROOT / "configs").glob("config_*.json")):
        if read_json(shipped)["data_loader"]["type"] == bundle:
            return f"configs/{shipped.name}"
    raise UserError(f"{path}: data_loader.type is '{bundle}', which no shipped config has.")


def table(runs: list[Run]) -> str:
    """Mean IoU of old, new and all classes and hIoU, a row per run."""
    width = max(len(run.label) for run in runs)
    lines = [
        f"{'mIoU in percent':<{max(width, 15)}}"
        + "".join(f"{heading:>8}" for heading in COLUMNS.values())
    ]
    for run in runs:
        values = run.results()
        cells = [f"{values[group]:8.2f}" if group in values else f"{'-':>8}" for group in COLUMNS]
        lines.append(f"{run.label:<{max(width, 15)}}" + "".join(cells))
    return "\n".join(lines)


def choose_images(data: IncrementalDataLoader, count: int) -> list[int]:
    """Positions of test images that show old and new classes, and as many classes as possible."""
    task, dataset = data.task, data.test_set
    shown: set[int] = set()
    chosen: list[int] = []
    no_class = {BACKGROUND, np.iinfo(dataset.table.dtype).max}
    present = [set(np.unique(dataset[i].label).tolist()) - no_class for i in range(len(dataset))]
    new = set(range(task.new_channels.start, task.new_channels.stop))
    while len(chosen) < min(count, len(dataset)):
        left = [i for i in range(len(dataset)) if i not in chosen]
        best = max(left, key=lambda i: (bool(present[i] & new) + len(present[i] - shown), -i))
        chosen.append(best)
        shown |= present[best]
    return chosen


def colour(labels: np.ndarray) -> Image.Image:
    """Label ids in the VOC palette, which begins anew after 256 of them."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette())
    return image.convert("RGB")


def picture(runs: list[Run], count: int, side: int) -> Image.Image:
    """A row per test image: image, truth, prediction of every run; below, the classes."""
    last = max(runs, key=lambda run: run.config["data_loader"]["args"]["task"]["step"])
    data = last.data()
    data.setup("test")
    samples = [data.test_set[i] for i in choose_images(data, count)]
    images = [sample.image for sample in samples]
    task = data.task
    ids = np.append(task.label_ids(), np.uint16(task.void))  # void, the largest label, is last
    truths = [ids[np.minimum(sample.label.numpy(), len(ids) - 1)] for sample in samples]
    columns = [[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]]
    columns.append([colour(truth) for truth in truths])
    found = {int(label) for truth in truths for label in np.unique(truth)}
    for run in runs:
        preds = run.predict(images, run.data().task)
        found |= {int(label) for label in np.unique(preds)}
        columns.append([colour(pred) for pred in preds])
    font, gap = ImageFont.load_default(size=14), 6
    headings = ["image", "truth", *(run.label for run in runs)]
    narrow = any(font.getlength(heading) > side for heading in headings)
    if narrow:  # method above step
        headings = [heading.replace(", ", "\n") for heading in headings]
    head = 44 if narrow else 26
    width = gap + len(columns) * (side + gap)
    names = sorted(found.intersection(task.classes))
    legend, rows = [], 1
    x: float = gap
    for label in names:
        text = data.task.class_names[label]
        step = next(t for t, members in enumerate(data.task.steps) if label in members)
        text = f"{text} (step {step})"
        need = 18 + font.getlength(text) + 14
        if x + need > width:
            x, rows = gap, rows + 1
        legend.append((x, rows - 1, label, text))
        x += need
    height = head + len(samples) * (side + gap) + rows * 22 + gap
    sheet = Image.new("RGB", (width, int(height)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (heading, tiles) in enumerate(zip(headings, columns, strict=True)):
        left = gap + column * (side + gap)
        middle = (left + side / 2, head / 2)
        draw.text(middle, heading, fill="black", font=font, anchor="mm", align="center")
        for row, tile in enumerate(tiles):
            method = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            sheet.paste(tile.resize((side, side), method), (left, head + row * (side + gap)))
    palette, bottom = voc_palette(), head + len(samples) * (side + gap)
    for x, row, label, text in legend:
        y = bottom + row * 22 + 4
        first = 3 * (label % 256)
        draw.rectangle((x, y, x + 14, y + 14), fill=tuple(palette[first : first + 3]))
        draw.text((x + 18, y + 7), text, fill="black", font=font, anchor="lm")
    return sheet


def main() -> None:
    """Parse the arguments, print the table, write the picture and print its path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="+", type=Path, help="folders of finished steps")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the picture")
    parser.add_argument("--images", type=int, default=6, help="rows of the picture")
    parser.add_argument("--side", type=int, default=192, help="pixels per tile")
    args = parser.parse_args()
    if args.images < 1 or args.side < 8:
        raise UserError("--images must be at least 1 and --side at least 8.")
    runs = [Run(folder) for folder in args.steps]
    print(table(runs))
    sheet = picture(runs, args.images, args.side)
    with atomic_path(args.out) as temporary:
        sheet.save(temporary, format="PNG")
    print(f"picture: {args.out.resolve()}")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
