"""What does a trained network see in my own images?

    python scripts/predict.py -r RUN/step_1/checkpoint-epoch60.pth --out answers photos/ cat.jpg
    python scripts/predict.py --steps saved_voc/models/overlap_15-5_DKD --out answers photos/

Images are files, or folders that are searched with all below them. The config lies beside the
weights; no data set is needed. Per image, in the folders below --out that it has below its own:

    NAME.png          label ids, a palette PNG; grey with 16 bits where ids exceed 255
    NAME_overlay.jpg  their colours over the image, with a legend
    NAME_score.png    with --scores: how sure the network is, 255 = certain
    NAME_steps.jpg    with --steps, instead of these: what each step of a run sees, side by side

and once classes.json, id, name, step and colour of each class. An image that is broken, or too
large for the memory, is told and left out. Exit code: 0 all done; 1 some image is broken or too
large; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.processes import signals, threads

if __name__ == "__main__":
    signals.end_at_once()
    threads.spin_briefly()

# isort: split
import numpy as np
import torch
from PIL import Image

from base.image_files import too_large
from data_loader.transforms import NoTransform
from models.pixels import size_of
from scripts.predicting.images import Found, batches, find
from scripts.predicting.memory import TooLarge, enough_memory
from scripts.predicting.student import Predictor, one_device, trained_steps
from utils.errors import UserError, one_sentence_errors
from utils.files import atomic_path, write_json
from utils.logger import progress
from utils.machine import cores
from utils.pictures import above, colour, label_image, legend, occurring, overlay, sheet
from utils.text import path_argument

SIDE = 320  # pixels of a picture in a sheet of steps
FEW = 8  # images that one process reads sooner than another one starts
SAVING: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 90},
}


def answers(
    predictor: Predictor, images: torch.Tensor, slide: bool, scores: bool
) -> Iterator[dict[str, Image.Image]]:
    """The pictures of each image of a batch, by the ending of their file."""
    if scores:
        labels, sure = predictor.scored(images, slide=slide)
    else:
        labels = predictor.predict(images, slide=slide)
    for number, image in enumerate(images):
        photo, seen = Image.fromarray(image.permute(1, 2, 0).numpy()), labels[number]
        size = max(14, photo.width // 60)
        names = legend(occurring(predictor.names, seen), photo.width, size)
        covered = overlay(photo, seen, predictor.label_ids[0])
        pictures = {".png": label_image(seen), "_overlay.jpg": above(covered, names)}
        if scores:
            bright = np.round(255 * sure[number]).astype(np.uint8)
            pictures["_score.png"] = Image.fromarray(bright)
        yield pictures


def sheets(
    predictors: dict[int, Predictor], images: torch.Tensor, slide: bool
) -> Iterator[dict[str, Image.Image]]:
    """What the steps of a run see in each image of a batch, by the ending of its file."""
    headings = ["image", *(f"step {step}" for step in predictors)]
    *_, last = predictors.values()
    labels = [predictor.predict(images, slide=slide) for predictor in predictors.values()]
    for image, *seen in zip(images, *labels, strict=True):
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        row = [photo, *(overlay(photo, ids, last.label_ids[0]) for ids in seen)]
        yield {"_steps.jpg": sheet(headings, [row], occurring(last.names, *seen), SIDE)}


def answer_all(
    answer: Callable[[Sequence[int], torch.Tensor], None],
    numbers: Sequence[int],
    images: torch.Tensor,
) -> list[int]:
    """Answer a batch; one image after the other when there is too little memory for all at once.

    Args:
        answer: takes the numbers of images and themselves.
        numbers: of the images of the batch.
        images: [N, 3, H, W] uint8.

    Returns:
        The numbers of those for which there is too little memory.
    """
    try:
        with enough_memory(images):
            answer(numbers, images)
        return []
    except TooLarge:
        if len(numbers) == 1:
            return [*numbers]
    # Not above, where the exception holds on to the memory.
    alone = zip(numbers, images.split(1), strict=True)
    return [number for one, image in alone for number in answer_all(answer, [one], image)]


def classes(predictor: Predictor) -> list[dict[str, Any]]:
    """What the label ids of the answers stand for."""
    return [
        {
            "id": int(label),
            "name": name,
            "step": predictor.steps.get(int(label)),
            "colour": colour(int(label)),
        }
        for label, name in zip(predictor.label_ids, predictor.task.channel_names(), strict=True)
    ]


def check_files(
    found: Sequence[Found], places: Sequence[Path], out: Path, endings: Sequence[str]
) -> None:
    """Whether every result has a file of its own, that is no image.

    Raises:
        UserError: it has not.
    """
    for place in places:
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"--out {out} lies in {place}, which is searched for images, so the next call "
                "would take answers for images; name a folder elsewhere."
            )
    whose: dict[Path, Path] = {}
    for path, name in found:
        for ending in endings:
            target = out / f"{name}{ending}"
            if (other := whose.setdefault(target, path)) != path:
                raise UserError(
                    f"{other} and {path} would both be written to {target}; rename one of them, or "
                    "call twice with another --out."
                )
    targets = {target.resolve() for target in whose}
    for path, _ in found:
        if path.resolve() in targets:
            raise UserError(f"{path} would be overwritten by an answer; give another --out.")


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, write the pictures, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", type=path_argument, metavar="IMAGE", help="image files and folders")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "-r", "--resume", type=path_argument, metavar="FILE", help="weights to predict with"
    )
    which.add_argument(
        "--steps", type=path_argument, metavar="RUN", help="folder of a run: all its steps"
    )
    add("--out", type=path_argument, metavar="DIR", required=True, help="folder of the answers")
    add(
        "--mode",
        choices=("whole", "slide", "crop"),
        default="whole",
        help="whole: the image at its size (default); slide: averages of overlapping windows of "
        "the evaluation's crop size, for large images; crop: what the evaluation judges, "
        "mostly the centre, the shorter side resized to the crop size",
    )
    add("--scores", action="store_true", help="also write how sure the network is")
    add("-d", "--device", metavar="ID", help="a GPU id, such as 0, or cpu")
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="images of the crop size in a batch, of larger ones fewer; default: 8",
    )
    add("--workers", type=int, metavar="N", help="processes that read; default: at most 4")
    args = parser.parse_args(argv)
    if args.batch < 1 or (args.workers or 0) < 0:
        raise UserError("--batch must be at least 1 and --workers at least 0.")
    if args.scores and args.steps:
        raise UserError("--scores is for the weights of -r; a sheet of --steps has no scores.")
    found, left_out = find(args.images)
    endings = [".png", "_overlay.jpg", *["_score.png"] * args.scores]
    check_files(found, args.images, args.out, ["_steps.jpg"] if args.steps else endings)
    device = one_device(args.device)
    files = trained_steps(args.steps) if args.steps else {0: args.resume}
    predictors = {step: Predictor.of(weights, device) for step, weights in files.items()}
    *_, last = predictors.values()
    write_json(args.out / "classes.json", classes(last))
    slide, faults = args.mode == "slide", list[str]()
    workers = min(4, cores(), len(found) // FEW) if args.workers is None else args.workers

    def answer(numbers: Sequence[int], images: torch.Tensor) -> None:
        if args.steps:
            results = sheets(predictors, images, slide)
        else:
            results = answers(last, images, slide, args.scores)
        for number, pictures in zip(numbers, results, strict=True):
            for ending, picture in pictures.items():
                target = args.out / f"{found[number].name}{ending}"
                with atomic_path(target) as temporary:
                    picture.save(temporary, **SAVING[target.suffix])

    with progress(total=len(found), desc="predict", unit="image") as bar:
        for numbers, images in batches(
            [path for path, _ in found],
            last.evaluated if args.mode == "crop" else NoTransform(),
            pixels=args.batch * last.crop_size**2,
            workers=workers,
            tell=faults.append,
        ):
            for number in answer_all(answer, numbers, images):
                height, width = size_of(images)
                words = too_large((width, height), "" if slide else "try --mode slide, ")
                faults.append(f"{found[number].path} {words}.")
            bar.update(len(numbers))
    for fault in faults:
        print(fault, file=sys.stderr)
    if left_out:
        print(f"left out of the folders: {left_out}")
    print(f"{len(found) - len(faults)} of {len(found)} images: {args.out.resolve()}")
    return 1 if faults else 0


if __name__ == "__main__":
    with one_sentence_errors():
        sys.exit(main())
