"""Small trees of images and masks in the layouts of the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 9, 6
GREY = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH))


def mask_of(ids: Sequence[int]) -> Image.Image:
    return Image.fromarray(np.resize(np.array(ids, np.uint8), (HEIGHT, WIDTH)))


def wide_mask(ids: Sequence[int]) -> Image.Image:
    """The same in 16 bits."""
    return Image.fromarray(np.resize(np.array(ids, np.uint16), (HEIGHT, WIDTH)))


def write_voc(root: Path, masks: dict[str, Sequence[int]], lines: str | None = None) -> Path:
    """A VOC tree; train and val are the same images, whose masks hold these label ids."""
    lists = root / "ImageSets" / "Segmentation"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", lists):
        (root / folder).mkdir(parents=True)
    for name, ids in masks.items():
        Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50)).save(root / "JPEGImages" / f"{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            mask_of(ids).save(root / folder / f"{name}.png")
    augmented = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    if lines is None:
        lines = "".join(augmented.format(name) for name in masks)
    (lists / "train_aug.txt").write_text(lines, encoding="utf-8")
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in masks), encoding="utf-8")
    return root


def write_ade(root: Path) -> Path:
    """An ADE tree: image k of a split holds the label ids 0, k and 150."""
    rows = (f"{k}  \t0.1\t11\t1\tthing {k}, item {k}  " for k in range(1, 151))
    for part in ("training", "validation"):
        images, masks = (root / kind / part for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for k in (3, 1, 2):
            GREY.convert("L" if k == 2 else "RGB").save(images / f"ADE_{part}_{k}.jpg")
            mask_of([0, k, 150]).save(masks / f"ADE_{part}_{k}.png")
    text = "\n".join(("Idx\tRatio\tTrain\tVal\tName", *rows, ""))
    (root / "objectInfo150.txt").write_text(text, encoding="utf-8")
    return root
