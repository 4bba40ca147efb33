"""The synthetic data set as a tree in PASCAL VOC layout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from PIL import Image

from base.image_files import list_folder
from scripts.toy_data.shapes import CLASS_NAMES, KINDS, VERSION, make_image
from utils.errors import UserError
from utils.files import atomic_path, write_json
from utils.logger import progress
from utils.pictures import palette_image

SIDES = range(32, 2049)  # any smaller, and the void borders eat the small shapes

# split: its list, the folder of its masks, a line of its list (as readers of VOC expect them)
AUG_LINE = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"
SPLITS = {
    "train": ("train_aug", "SegmentationClassAug", AUG_LINE),
    "val": ("val", "SegmentationClass", "{0}"),
}


def _write(root: Path, counts: dict[str, int], size: tuple[int, int], seed: int) -> None:
    for folder in ("JPEGImages", "ImageSets/Segmentation", *(s[1] for s in SPLITS.values())):
        (root / folder).mkdir(parents=True)
    number = 0
    for split, (listed, masks, line) in SPLITS.items():
        names = []
        for index in progress(range(counts[split]), desc=f"toy {split}", unit="image"):
            names.append(f"toy_{number:06d}")
            number += 1
            pixels, labels = make_image(seed, split, index, size)
            # Full colour resolution: at this size halved chroma would smear the textures.
            photo = root / "JPEGImages" / f"{names[-1]}.jpg"
            Image.fromarray(pixels).save(photo, quality=92, subsampling=0)
            palette_image(labels).save(root / masks / f"{names[-1]}.png")
        text = "".join(line.format(name) + "\n" for name in names)
        (root / "ImageSets/Segmentation" / f"{listed}.txt").write_text(text, encoding="utf-8")
    write_json(root / "class_names.json", CLASS_NAMES)


def make_saliency(root: Path, out: Path) -> None:
    """Write saliency maps of the training images of a data set: whatever is drawn is salient."""
    folder = root / SPLITS["train"][1]
    out.mkdir(parents=True, exist_ok=True)
    for name in progress(list_folder(folder).images, desc="saliency", unit="image"):
        with Image.open(folder / name) as mask, atomic_path(out / name) as temporary:
            mask.convert("L").point([0, *[255] * 255]).save(temporary, format="PNG")


def _holds(out: Path, parameters: dict[str, object]) -> bool:
    """Whether `out` was made with these very parameters; False when there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        stored = json.loads((out / "toy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{out} exists and is not a folder made by this script; name a new or empty folder."
        ) from None
    if stored != parameters:
        raise UserError(
            f"{out} was made with other parameters ({stored} instead of {parameters}); "
            "name another folder or remove this one."
        )
    return True


def make_toy_voc(out: Path, train: int, val: int, size: tuple[int, int], seed: int) -> None:
    """Write the data set to `out`, or do nothing when `out` already is this data set.

    Every class occurs in a split that has at least 20 images.

    Raises:
        UserError: for unusable numbers, or when `out` holds something else or cannot be written.
    """
    counts = {"train": train, "val": val}
    for split, count in counts.items():
        if count < 1:
            raise UserError(f"--{split} is {count}; it must be at least 1.")
    if not all(side in SIDES for side in size):
        limits = f"at least {SIDES[0]} and at most {SIDES[-1]} pixels"
        raise UserError(f"--size is {size[0]}x{size[1]}; both sides must be {limits}.")
    parameters = {"version": VERSION, **counts, "size": [*size], "seed": seed}
    out = Path(out).resolve()
    try:
        if _holds(out, parameters):
            print(f"{out} already holds this data set: nothing to do.")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        # Made inside a temporary sibling, so that what bears the name `out` is always complete.
        with tempfile.TemporaryDirectory(".part", f".{out.name}.", out.parent) as temporary:
            root = Path(temporary) / out.name
            _write(root, counts, size, seed)
            write_json(root / "toy.json", parameters)
            if out.exists():
                out.rmdir()  # empty, else _holds had objected
            root.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}.") from error
    print(f"{out}: {train} training and {val} validation images, {len(KINDS)} classes.")
