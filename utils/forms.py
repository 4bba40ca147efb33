"""The form of what is read back: tables of what must stand where, and a phrase for what does not.

A form is one of

    Key                a plain value (`utils/config_schema.py`), or anything else that has
                       `accepts(value)` and `expected()`
    {"name": form}     a dict with these names; the form of `...` is that of every other name, which
                       may hold anything where there is none
    Maybe(form)        of a name of a dict: it may be absent
    [form]             a list of any number of such, up to `MOST_ITEMS`
    (form, form)       a list of just these
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.config_schema import NULL, NUMBER, Key
from utils.errors import listing, shortened

MOST_ITEMS = 100_000  # of a list
COUNT = Key("", (int,), 0, most=10**9)
FLAG = Key("", (bool,))
TEXT = Key("", (str,))
TEXT_OR_NONE = Key("", (str, NULL))
REAL = Key("", NUMBER)
REAL_OR_NONE = Key("", (*NUMBER, NULL))


@dataclass(frozen=True)
class Maybe:
    """The form of a value that a dict may lack."""

    form: Any


class Plain:
    """Numbers, text, truth values, null, and lists and dicts of them."""

    def expected(self) -> str:
        """What is valid, for a message."""
        return "plain values"

    def accepts(self, value: Any) -> bool:
        """Whether it is that."""
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return False
        return True


PLAIN = Plain()


def fault(value: Any, form: Any, name: str = "") -> str | None:
    """What is wrong with `value`, as `task.step is -1, but must be a whole number >= 0`.

    Args:
        value: what was read.
        form: what it must be.
        name: of the value, for the message; empty for the whole.

    Returns:
        The first fault, None where there is none.
    """
    prefix, what = (f"{name}." if name else ""), name or "the whole"
    if isinstance(form, Maybe):
        return fault(value, form.form, name)
    if isinstance(form, dict):
        names = [key for key in form if key is not ...]
        if not isinstance(value, dict):
            known = f" with {listing(names, most=6)}" if names else " of names and values"
            return f"{what} is {shown(value)}, but must be a block{known}"
        for key in names:
            if key not in value and not isinstance(form[key], Maybe):
                return f"{prefix}{key} is missing"
        forms = ((key, form.get(key, form.get(...))) for key in value)
        faults = (
            fault(value[key], below, f"{prefix}{shortened(str(key))}")
            for key, below in forms
            if below is not None
        )
        return next(filter(None, faults), None)
    if isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return f"{what} is {shown(value)}, but must be a list"
        if len(value) > MOST_ITEMS:
            return f"{what} has {len(value):,} items, but may have {MOST_ITEMS:,}"
        if isinstance(form, tuple) and len(value) != len(form):
            return f"{what} has {len(value)} items, but must have {len(form)}"
        each_form: Sequence[Any] = form if isinstance(form, tuple) else form * len(value)
        numbered = enumerate(zip(value, each_form, strict=True))
        faults = (fault(each, below, f"{what}[{number}]") for number, (each, below) in numbered)
        return next(filter(None, faults), None)
    if not form.accepts(value):
        return f"{what} is {shown(value)}, but must be {form.expected()}"
    return None


def shown(value: Any) -> str:
    """A value in a message: what is long or nested by its kind and size."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if value is None or isinstance(value, (bool, int, str)):
        return shortened(json.dumps(value))
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a block of {len(value)}"
    return f"a {type(value).__name__}"
