"""Fonts that have the letters of a text, in whatever script, among those that Matplotlib finds."""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INVISIBLE = ("Zs", "Cf")  # categories of Unicode: blanks, and what only guides its neighbours


@cache
def font_for(text: str, size: int) -> Font | None:
    """A font that has every letter of a text; None when no font here has.

    Args:
        text: in one line.
        size: of the letters, in pixels.
    """
    if text.isascii():
        return ImageFont.load_default(size=size)
    letters = {letter for letter in text if unicodedata.category(letter) not in INVISIBLE}
    if not features.check("raqm") and any(map(_needs_layout, letters)):
        return None
    for file in _files():
        try:
            if {ord(letter) for letter in letters} <= _characters(file):
                return ImageFont.truetype(file, size)
        except (OSError, RuntimeError):  # it is damaged, or has letters of other sizes only
            continue
    return None


def _needs_layout(letter: str) -> bool:
    """Whether a letter runs from right to left or joins others, for which Pillow needs Raqm."""
    marks = unicodedata.category(letter) in ("Mn", "Mc")
    return marks or unicodedata.bidirectional(letter) in ("R", "AL")


@cache
def _files() -> tuple[str, ...]:
    """Matplotlib's own DejaVu Sans, then the system's fonts, upright and regular ones first."""
    from matplotlib import font_manager  # takes a while, for letters that few need

    def odd(font: font_manager.FontEntry) -> tuple[bool, bool, bool, str]:
        plain = font.style == "normal" and font.weight in (400, "normal", "regular")
        return font.name != "DejaVu Sans", not plain, "Mono" in font.name, font.fname

    fonts = sorted(font_manager.fontManager.ttflist, key=odd)
    # The one of the last resort shows of every letter from which script it is.
    return tuple(font.fname for font in fonts if not font.name.startswith("Last Resort"))


@cache
def _characters(file: str) -> frozenset[int]:
    """The code points of which a font has a picture."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(file).get_charmap())
