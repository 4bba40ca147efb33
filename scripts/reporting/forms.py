"""What the files of a run must hold that a report reads: a table for each of them.

What a test must also fulfil as a whole is judged in `consistency.py`. Keys that older versions did
not write may be missing.
"""

from __future__ import annotations

import re
from typing import Any

from base.task import SETTINGS
from trainer.results import PREVIOUS, WEIGHTS
from utils.config_schema import NULL, NUMBER, Key
from utils.forms import FLAG, REAL, Maybe
from utils.labels import BACKGROUND, VOID, WIDE_VOID

MOST_PIXELS = 2**53  # up to here, sums and quotients of whole numbers are exact in float64


class Text:
    """A text of a pattern, which `meaning` says in a message."""

    def __init__(self, pattern: str, meaning: str):
        self.pattern, self.meaning = re.compile(pattern), meaning

    def expected(self) -> str:
        """What is valid, for a message."""
        return self.meaning

    def accepts(self, value: Any) -> bool:
        """Whether it is that."""
        return isinstance(value, str) and self.pattern.fullmatch(value) is not None


NAME = Text(r"[\w.+-]{1,100}", "a name of letters, digits, '_', '-', '+' and '.'")
PRINTABLE = Text(
    r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,1000}",
    "a text of at most 1,000 characters, none of them a control character",
)
PATH = Text(r"[^\0]{0,4096}", "a path")  # which need not be UTF-8
HASH = Text("[0-9a-f]{1,64}", "a hash in hexadecimal digits")
WHOLE = Key("", (int,), 0)
PIXELS = Key("", (int,), 0, most=MOST_PIXELS)
LABEL = Key("", (int,), 0, most=WIDE_VOID)
SCHEDULE = [[LABEL]]
MATRIX = [[PIXELS]]
LIST = {
    "images": WHOLE,
    "sha256": HASH,
    "published": Key("", (bool, NULL)),
    "contents": Maybe(HASH),
}
CLASS = {"label_id": LABEL, "name": PRINTABLE, "pixels": Maybe(PIXELS)}

METRICS = {
    "dataset": NAME,
    "task": NAME,
    "setting": Key("", (str,), choices=SETTINGS),
    "step": WHOLE,
    "name": NAME,
    "method": NAME,
    "classes": [CLASS | {"IoU": Maybe(REAL), "accuracy": Maybe(REAL)}],
    "confusion": MATRIX,
    "wide": Maybe(MATRIX),
    "future_classes": Maybe([CLASS]),
    "metrics": Maybe({...: {...: REAL}}),
    "steps": Maybe(SCHEDULE),
    "joint": Maybe(FLAG),
    "memory": Maybe(WHOLE),
    "seed": Maybe(WHOLE),
    "split": Maybe(Key("", (str,), choices=("test", "val"))),
    "protocol": Maybe(
        {
            "future_classes": Key("", (int,), choices=(BACKGROUND, VOID)),
            "background": FLAG,
            "images": PRINTABLE,
        }
    ),
    "lists": Maybe({...: LIST}),
    "images": Maybe(WHOLE),
    "epoch": Maybe(WHOLE),
    "seconds": Maybe(Key("", NUMBER, 0)),
    "weights": Maybe(PATH),
    WEIGHTS: Maybe(HASH),
    PREVIOUS: Maybe(Key("", (str, NULL))),
    "lengthened": Maybe([WHOLE]),
    "own_code": Maybe({...: HASH}),
    **dict.fromkeys(("version", "code", "torch", "device", "precision"), Maybe(PRINTABLE)),
}
PASSES = {"of": HASH, "checksum": Maybe(HASH), "passes": {...: MATRIX}}
COSTS = {"epochs": [{"seconds": REAL, "whole": FLAG}]}  # of a history, beside its own form
BASE = {"record": {"settings": {"global batch": Maybe(Key("", (int,), 1))}}}
