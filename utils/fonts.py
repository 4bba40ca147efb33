"""Fonts that have the letters of a text, in whatever script, among those of this machine."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
ENDINGS = (".ttf", ".otf", ".ttc")
IN_MATPLOTLIB = "mpl-data/fonts/ttf/DejaVuSans.ttf"
NO_CHARACTER = "\uffff"  # of which every font has the same picture as of a letter that it lacks
INVISIBLE = ("Zs", "Cf")  # categories of Unicode: blanks, and what only guides its neighbours


@cache
def font_for(text: str, size: int) -> Font | None:
    """A font that has every letter of a text; None when no font here has.

    Args:
        text: in one line.
        size: of the letters, in pixels.
    """
    letters = {letter for letter in text if unicodedata.category(letter) not in INVISIBLE}
    if not features.check("raqm") and any(map(_needs_layout, letters)):
        return None
    for file in _files():
        font = _font(file, size)
        if font is not None and not any(_lacks(file, letter) for letter in letters):
            return font
    return None


def _needs_layout(letter: str) -> bool:
    """Whether a letter runs from right to left or joins others, for which Pillow needs Raqm."""
    marks = unicodedata.category(letter) in ("Mn", "Mc")
    return marks or unicodedata.bidirectional(letter) in ("R", "AL")


def _files() -> Iterator[Path | None]:
    """Pillow's own font (None), Matplotlib's, those of the system."""
    yield None
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / IN_MATPLOTLIB
    yield from _system_files()


@cache
def _system_files() -> tuple[Path, ...]:
    """The fonts of the system, upright ones without serifs first."""
    found = [
        path
        for folder in FOLDERS
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in ENDINGS and not path.stem.startswith("LastResort")
    ]
    odd = ("Bold", "Italic", "Oblique", "Light", "Thin", "Black", "Mono", "Serif")
    return tuple(sorted(found, key=lambda path: (any(w in path.stem for w in odd), path.stem)))


@cache
def _font(file: Path | None, size: int) -> Font | None:
    if file is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(str(file), size)
    except OSError:  # it is damaged, or has letters of other sizes only
        return None


@cache
def _lacks(file: Path | None, letter: str) -> bool:
    return _picture(file, letter) == _picture(file, NO_CHARACTER)


@cache
def _picture(file: Path | None, letter: str) -> tuple[tuple[int, int], bytes]:
    font = _font(file, 24)
    assert font is not None, "the same font has been opened in another size"
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
