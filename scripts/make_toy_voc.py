"""Make a small synthetic data set in PASCAL VOC layout: 20 kinds of coloured, patterned shapes.

Called from the command line (`python scripts/make_toy_voc.py --out DIR`) and from tests, wherever
a run needs data that a small network learns from scratch on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.logger import progress
from utils.misc import UserError, one_sentence_errors, seed_from, voc_palette, write_json

VERSION = 1  # raise it whenever the same parameters would give other pixels
VOID = 255
SUPERSAMPLE = 4
SIDES = range(32, 2049)  # any smaller, and the void borders eat the small shapes

# split: its list, the folder of its masks, a line of its list (as readers of VOC expect them)
AUG_LINE = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"
SPLITS = {
    "train": ("train_aug", "SegmentationClassAug", AUG_LINE),
    "val": ("val", "SegmentationClass", "{0}"),
}

# fmt: off
COLOURS = {
    "red": (214, 40, 40),     "orange": (245, 130, 20), "brown": (115, 66, 28),
    "yellow": (250, 212, 40), "lime": (150, 225, 50),   "green": (25, 125, 55),
    "teal": (0, 112, 118),    "cyan": (60, 205, 235),   "blue": (35, 95, 225),
    "navy": (22, 26, 105),    "violet": (122, 48, 178), "pink": (250, 130, 185),
    "black": (22, 22, 24),    "white": (248, 248, 244),
}
# fmt: on

Array = np.ndarray
Rng = np.random.Generator


class Kind(NamedTuple):
    """What one class looks like; `accent` is the second colour of its texture."""

    colour: str
    texture: str
    shape: str
    accent: str = "white"

    @property
    def name(self) -> str:
        return " ".join(self[:3]).replace("plain ", "")


# Class k is KINDS[k - 1]. No two share both colour and texture, so a small receptive field is
# enough to tell them apart; the two kinds of each shape are far apart in colour.
# fmt: off
KINDS = (
    Kind("red", "plain", "disc"),                   Kind("blue", "striped", "star"),
    Kind("yellow", "plain", "square"),              Kind("green", "dotted", "heart"),
    Kind("orange", "striped", "triangle", "brown"), Kind("violet", "plain", "ring"),
    Kind("cyan", "checked", "hexagon", "navy"),     Kind("pink", "plain", "crescent"),
    Kind("black", "plain", "cross"),                Kind("white", "dotted", "diamond", "red"),
    Kind("lime", "plain", "triangle"),              Kind("black", "checked", "square"),
    Kind("red", "striped", "ring"),                 Kind("navy", "dotted", "hexagon", "yellow"),
    Kind("yellow", "dotted", "disc", "black"),      Kind("brown", "checked", "cross"),
    Kind("pink", "striped", "heart", "violet"),     Kind("violet", "checked", "diamond", "yellow"),
    Kind("white", "plain", "star"),                 Kind("teal", "plain", "crescent"),
)
# fmt: on
CLASS_NAMES = ["background", *(kind.name for kind in KINDS)]


def _around(count: int, *radii: float, x: float = 0.0, turn: float = 0.0) -> Array:
    """`count` corners around (x, 0), the first one straight up, their distances cycling."""
    angles = 2 * np.pi * (np.arange(count) / count + turn) - np.pi / 2
    distances = np.resize(radii, count)
    return np.stack([x + distances * np.cos(angles), distances * np.sin(angles)], axis=1)


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 15


def _cross(arm: float) -> Array:
    x = np.array([arm, arm, 1, 1, arm, arm, -arm, -arm, -1, -1, -arm, -arm])
    return np.stack([x, np.roll(x, 3)], axis=1)


# Outlines of about radius 1, y downwards; a second outline is cut out of the first.
SHAPES = {
    "disc": [_around(60, 1.0)],
    "square": [_around(4, 1.2, turn=1 / 8)],
    "triangle": [_around(3, 1.2)],
    "star": [_around(10, 1.2, 0.56)],
    "ring": [_around(60, 1.05), _around(60, 0.42)],
    "cross": [_cross(0.38)],
    "hexagon": [_around(6, 1.05)],
    "heart": [_heart()],
    "crescent": [_around(60, 1.1), _around(60, 0.8, x=0.55)],
    "diamond": [_around(4, 1.25, 0.85)],
}


def _pattern(texture: str, u: Array, v: Array, radius: float) -> Array:
    """How much accent colour, 0 to 1, is at (u, v); edges are about one pixel soft."""
    frequency = 2 * np.pi / (0.75 if texture == "checked" else 0.55)
    a, b = frequency * u, frequency * v
    wave = {
        "plain": lambda: np.full_like(a, -np.inf),
        "striped": lambda: np.cos(a),
        "dotted": lambda: np.cos(a) + np.cos(b) - 0.6,
        "checked": lambda: np.sin(a) * np.sin(b),
    }[texture]()
    return np.clip(0.5 + wave * radius / frequency, 0, 1)


def _background(rng: Rng, width: int, height: int) -> Array:
    """Soft greyish clouds of middle lightness, so that black and white stay object colours."""
    grey = rng.uniform(105, 165) + rng.uniform(-14, 14, 3)  # one tint per image
    canvas = np.zeros((height, width, 3), np.float32) + grey
    for cells, strength in ((3, 20), (9, 6)):
        clouds = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        smooth = Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC)
        canvas += strength * np.asarray(smooth)[..., None] * rng.uniform(0.8, 1.2, 3)
    return canvas


def _paint(rng: Rng, canvas: Array, mask: Array, label: int, centre: Array, radius: float) -> None:
    """Draw one object of class `label` over what `canvas` and `mask` hold so far."""
    kind = KINDS[label - 1]
    height, width = mask.shape
    turn = np.deg2rad(rng.uniform(-35, 35))  # little enough for a heart to remain a heart
    rotation = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])

    layer = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    for fill, outline in zip((255, 0), SHAPES[kind.shape], strict=False):
        corners = (outline @ rotation * radius + centre) * SUPERSAMPLE
        ImageDraw.Draw(layer).polygon(corners.ravel().tolist(), fill=fill)
    layer = layer.reduce(SUPERSAMPLE)

    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) + 0.5
    offset = (grid - centre) / radius
    local = offset @ rotation.T
    accent = _pattern(kind.texture, local[..., 0], local[..., 1], radius)[..., None]
    base, second = np.array(COLOURS[kind.colour]), np.array(COLOURS[kind.accent])
    colour = base + (second - base) * accent + rng.uniform(-10, 10, 3)
    colour -= 12 * offset.sum(axis=-1, keepdims=True)  # light from the upper left
    cover = np.asarray(layer)
    canvas += (colour - canvas) * (cover[..., None] / 255)

    # Pixels shared with what lies behind are void, and so is one pixel all around the full ones
    # (an edge may fall exactly between two pixels): no label is ever half right.
    full = layer.point(lambda value: 255 * (value == 255))
    mask[(cover > 0) | (np.asarray(full.filter(ImageFilter.MaxFilter(3))) > 0)] = VOID
    mask[cover == 255] = label


def make_image(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[Array, Array]:
    """One picture and its mask as arrays: a pure function of the arguments."""
    rng = np.random.default_rng(seed_from("toy", VERSION, seed, split, index))
    width, height = size
    canvas, mask = _background(rng, width, height), np.zeros((height, width), np.uint8)
    first = index % len(KINDS) + 1  # cycling keeps the classes balanced
    others = rng.permutation([k for k in range(1, len(KINDS) + 1) if k != first])
    placed: list[tuple[Array, float]] = []
    for label in [first, *others[: rng.choice(3, p=(0.3, 0.45, 0.25))].tolist()]:
        for _ in range(40):  # where there is no room left, the picture has an object less
            radius = min(size) * rng.uniform(0.34, 0.55) / 2
            centre = rng.uniform(1.1 * radius, np.array(size) - 1.1 * radius)
            if all(np.hypot(*(centre - c)) > 0.88 * (radius + r) for c, r in placed):
                _paint(rng, canvas, mask, label, centre, radius)
                placed.append((centre, radius))
                break
    canvas += rng.normal(0, 3, canvas.shape)
    return np.clip(canvas, 0, 255).round().astype(np.uint8), mask


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
            mask = Image.fromarray(labels)
            mask.putpalette(voc_palette())
            mask.save(root / masks / f"{names[-1]}.png")
        text = "".join(line.format(name) + "\n" for name in names)
        (root / "ImageSets/Segmentation" / f"{listed}.txt").write_text(text, encoding="utf-8")
    write_json(root / "class_names.json", CLASS_NAMES)


def _holds(out: Path, parameters: dict[str, object]) -> bool:
    """Whether `out` was made with these very parameters; False when there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "toy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{out} exists and is not a folder made by this script; name a new or empty folder."
        ) from None
    if found != parameters:
        raise UserError(
            f"{out} was made with other parameters ({found} instead of {parameters}); "
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


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels, as in 128x96")
    return int(match[1]), int(match[2])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help).")


def main() -> None:
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; new or empty")
    add("--train", type=int, default=600, metavar="N", help="training images (%(default)s)")
    add("--val", type=int, default=100, metavar="N", help="validation images (%(default)s)")
    add("--size", type=_size, default="128x96", metavar="WxH", help="image size (%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="same seed, same files (%(default)s)")
    make_toy_voc(**vars(parser.parse_args()))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
