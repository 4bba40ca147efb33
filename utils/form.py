"""What a JSON file that this project wrote must hold when it is read back, as a table.

A form is a `Value`; `[form]`, a list of such items; a dict, a block, in which `"key"` must be and
`"key?"` may be; or a `Map`, a block with any names. Keys that a form does not name are ignored: a
newer version may write more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from utils.config_file import read_json
from utils.misc import UserError, listing

LARGEST_FILE = 64 * 2**20  # bytes; the matrices of a test of 2,000 classes come to half of it
COUNTS = 2**53  # up to here, sums and quotients of whole numbers are exact in float64
FINITE = 3.5e38  # just above the largest float32


class Value(NamedTuple):
    """A plain value.

    Attributes:
        expected: what is valid, in words.
        accepts: whether a value is.
    """

    expected: str
    accepts: Callable[[Any], bool]


class Map(NamedTuple):
    """A block with any number of keys.

    Attributes:
        names: what every key must be.
        each: the form of every part.
    """

    names: Value
    each: Any


Form = Value | Map | list[Any] | dict[str, Any]


def whole(least: int = 0, most: int = COUNTS) -> Value:
    """A whole number; neither a fraction nor true."""
    return Value(
        f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most
    )


def number(least: float = -FINITE, most: float = FINITE) -> Value:
    """A number that is finite."""
    return Value(
        f"a number from {least:g} to {most:g}",
        lambda v: type(v) in (int, float) and least <= v <= most,
    )


def text(pattern: str = ".+", expected: str = "a text without control characters") -> Value:
    """A text of at most 4,096 characters that `pattern` describes and any console can print."""
    control = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
    return Value(
        expected,
        lambda v: (
            isinstance(v, str)
            and len(v) <= 4096
            and not control.search(v)
            and re.fullmatch(pattern, v) is not None
        ),
    )


def choice(*valid: object) -> Value:
    """One of some plain values."""
    return Value(
        f"one of {listing(map(json.dumps, valid))}",
        lambda v: any(type(v) is type(each) and v == each for each in valid),
    )


def optional(value: Value) -> Value:
    """The same, or null."""
    return Value(f"{value.expected}, or null", lambda v: v is None or value.accepts(v))


NAME = text(r"[\w.+-]{1,100}", "a name of letters, digits, '_', '-', '+' and '.'")
PATH = Value("a path", lambda v: isinstance(v, str) and len(v) <= 4096 and "\0" not in v)
BOOLEAN = choice(True, False)


def read(file: Path, form: Form) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, is larger than `LARGEST_FILE`, or is not of the form; the
            sentence names the first place that is not.
    """
    size = os.path.getsize(file) if os.path.isfile(file) else 0
    if size > LARGEST_FILE:
        raise UserError(
            f"{file} has {size / 2**20:.0f} MiB, which no such file comes to; it is not read."
        )
    if fault := fault_of(content := read_json(file, "file"), form):
        place, words = fault
        raise UserError(f"{file}{':' if place else ''}{place.replace('.', ' ', 1)} {words}.")
    return content


def fault_of(value: Any, form: Form) -> tuple[str, str] | None:
    """The first place in `value` that is not of the form, as `.a[0].b`, and what is wrong there."""
    if isinstance(form, Value):
        if form.accepts(value):
            return None
        return "", f"is {_shown(value)}, but must be {form.expected}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return "", f"is {_shown(value)}, but must be a list"
        parts = ((f"[{at}]", item, form[0]) for at, item in enumerate(value))
        return _first_fault(parts)
    if not isinstance(value, dict):
        return "", f"is {_shown(value)}, but must be a block {{…}}"
    if isinstance(form, Map):
        if wrong := [key for key in value if not form.names.accepts(key)]:
            return "", f"has the key {_shown(wrong[0])}, but keys must be {form.names.expected}"
        return _first_fault((f".{key}", part, form.each) for key, part in value.items())
    forms = {key.removesuffix("?"): each for key, each in form.items()}
    if missing := [key for key in form if not key.endswith("?") and key not in value]:
        return "", f"has no '{missing[0]}'"
    return _first_fault((f".{key}", value[key], forms[key]) for key in forms if key in value)


def _first_fault(parts: Iterable[tuple[str, Any, Form]]) -> tuple[str, str] | None:
    for place, part, form in parts:
        if fault := fault_of(part, form):
            return place + fault[0], fault[1]
    return None


def _shown(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a block {…}"
    words = json.dumps(value)
    return words if len(words) <= 40 else f"{words[:40]}…"
