"""Pictures of coloured, patterned shapes and their masks, as pure functions of a seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils.seeds import seed_from

VERSION = 1  # raise it whenever the same parameters would give other pixels
VOID = 255
SUPERSAMPLE = 4

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
