"""Pictures of label maps: palette images, overlays, legends, sheets of tiles.

Used wherever predictions are shown or masks are written. Knows pixels, label ids and names; no
model and no task.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.fonts import Font, font_for
from utils.labels import BACKGROUND
from utils.logger import log

GAP = 6  # pixels between the parts of a sheet
STRENGTH = 0.6  # share of an overlay's colours


def colour(label: int) -> tuple[int, int, int]:
    """Red, green and blue of a label id in the PASCAL VOC colour map, which has 256 and repeats.

    Source: the VOC development kit's label colour map, which deals the bits of the id out to the
    high bits of red, green and blue in turn.
    """
    bits = [label >> bit & 1 for bit in range(8)] + [0]
    red, green, blue = (
        sum(bit << (7 - place) for place, bit in enumerate(bits[channel::3]))
        for channel in range(3)
    )
    return red, green, blue


@cache
def voc_palette() -> list[int]:
    """The PASCAL VOC colour map as 768 values (r, g, b of id 0, of id 1, …)."""
    return [value for label in range(256) for value in colour(label)]


def palette_image(labels: np.ndarray) -> Image.Image:
    """Label ids [H, W], uint8 or uint16, in the VOC palette; ids beyond 255 begin it anew."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette())
    return image


def label_image(labels: np.ndarray) -> Image.Image:
    """An image whose pixel values are the label ids: palette for uint8, grey for uint16."""
    return palette_image(labels) if labels.dtype == np.uint8 else Image.fromarray(labels)


def overlay(photo: Image.Image, labels: np.ndarray, bare: int = BACKGROUND) -> Image.Image:
    """The colours of label ids [H, W] over an RGB image of that size; `bare` ones show it alone."""
    blended = Image.blend(photo, palette_image(labels).convert("RGB"), STRENGTH)
    covered = Image.fromarray(np.where(labels == bare, np.uint8(0), np.uint8(255)))
    return Image.composite(blended, photo, covered)


def occurring(names: Mapping[int, str], *maps: np.ndarray) -> dict[int, str]:
    """The names of the label ids that occur in some of the maps, ascending."""
    found = {int(k) for labels in maps for k in np.flatnonzero(np.bincount(labels.ravel()))}
    return {label: names[label] for label in sorted(found & names.keys())}


def legend(names: Mapping[int, str], width: int, size: int = 14) -> Image.Image:
    """Names behind squares of their label ids' colours.

    Args:
        names: by label id.
        width: in pixels, more if a name needs it.
        size: of the letters, in pixels.
    """
    row, places, x, y = round(1.6 * size), [], GAP, 0
    texts = [_writable(label, name, size) for label, name in names.items()]
    needs = [round(1.3 * size + font.getlength(text)) + 2 * GAP for text, font in texts]
    width = max([width, *(GAP + need for need in needs)])
    for need in needs:
        if x + need > width:
            x, y = GAP, y + row
        places.append((x, y))
        x += need
    image = Image.new("RGB", (width, y + row if names else 0), "white")
    draw = ImageDraw.Draw(image)
    for label, (text, font), (x, y) in zip(names, texts, places, strict=True):
        top = y + (row - size) // 2
        draw.rectangle((x, top, x + size - 1, top + size - 1), fill=colour(label))
        draw.text((x + 1.3 * size, y + row / 2), text, fill="black", font=font, anchor="lm")
    return image


def _writable(label: int, name: str, size: int) -> tuple[str, Font]:
    """A name and a font that has its letters; the label id where no font has."""
    text = unicodedata.normalize("NFC", name)
    if (font := font_for(text, size)) is not None:
        return text, font
    _warn_of(label, name)
    return str(label), ImageFont.load_default(size=size)


@cache
def _warn_of(label: int, name: str) -> None:
    """Once for each name."""
    log.warning(
        "no font of this machine has all letters of the class name '%s': pictures show its label "
        "id, %d, instead; install a font of its script, such as one of Noto Sans",
        name,
        label,
    )


def above(picture: Image.Image, caption: Image.Image) -> Image.Image:
    """A picture above another one, on white."""
    width, height = max(picture.width, caption.width), picture.height + caption.height
    both = Image.new("RGB", (width, height), "white")
    both.paste(picture, (0, 0))
    both.paste(caption, (0, picture.height))
    return both


def sheet(
    headings: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    names: Mapping[int, str],
    side: int,
) -> Image.Image:
    """Pictures in rows and columns, the columns under headings, above a legend.

    Args:
        headings: of the columns; one that is too wide goes on below its ", ".
        rows: pictures of any sizes and modes, those of palette images are not blurred.
        names: of the legend, by label id.
        side: pixels of a picture's longer side.
    """
    tiles = [[_tile(picture, side) for picture in row] for row in rows]
    column = max(tile.width for row in tiles for tile in row)
    font = ImageFont.load_default(size=14)
    if any(font.getlength(heading) > column for heading in headings):
        headings = [heading.replace(", ", "\n") for heading in headings]
    y = 8 + 18 * max(1 + heading.count("\n") for heading in headings)
    height = y + sum(max(tile.height for tile in row) + GAP for row in tiles)
    image = Image.new("RGB", (GAP + len(headings) * (column + GAP), height), "white")
    draw = ImageDraw.Draw(image)
    lefts = range(GAP, image.width, column + GAP)
    for left, heading in zip(lefts, headings, strict=True):
        middle = (left + column / 2, y / 2)
        draw.text(middle, heading, fill="black", font=font, anchor="mm", align="center")
    for row in tiles:
        for left, tile in zip(lefts, row, strict=True):
            image.paste(tile, (left + (column - tile.width) // 2, y))
        y += max(tile.height for tile in row) + GAP
    return above(image, legend(names, image.width))


def _tile(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    blurs = picture.mode != "P"
    way = Image.Resampling.BILINEAR if blurs else Image.Resampling.NEAREST
    return picture.resize((width, height), way).convert("RGB")
