"""What the files of a run must hold that a report reads: a table for each of them.

What a test must also fulfil as a whole (matrices that fit, figures that follow from them) is judged
where it is read, in `results.py`. Optional keys are those that older versions did not write.
"""

from __future__ import annotations

from base.task import SETTINGS
from trainer.results import PREVIOUS, WEIGHTS
from utils.form import BOOLEAN, NAME, PATH, Map, choice, number, optional, text, whole
from utils.misc import BACKGROUND, VOID, WIDE_VOID

WORDS = text()
LABEL = whole(most=WIDE_VOID)
SCHEDULE = [[LABEL]]
MATRIX = [[whole()]]  # of pixel counts
CLASS = {"label_id": LABEL, "name": WORDS, "pixels?": whole()}
HASH = text("[0-9a-f]+", "a hash in hexadecimal digits")

METRICS = {
    "dataset": NAME,
    "task": NAME,
    "setting": choice(*SETTINGS),
    "step": whole(),
    "name": NAME,
    "method": NAME,
    "classes": [CLASS | {"IoU?": number(), "accuracy?": number()}],
    "confusion": MATRIX,
    "wide?": MATRIX,
    "future_classes?": [CLASS],
    "metrics?": Map(NAME, Map(NAME, number())),
    "steps?": SCHEDULE,
    "joint?": BOOLEAN,
    "memory?": whole(),
    "seed?": whole(most=2**63 - 1),
    "split?": choice("test", "val"),
    "protocol?": {
        "future_classes": choice(BACKGROUND, VOID),
        "background": BOOLEAN,
        "images": WORDS,
    },
    "lists?": Map(
        NAME,
        {
            "images": whole(),
            "sha256": HASH,
            "published": optional(BOOLEAN),
        },
    ),
    "images?": whole(),
    "epoch?": whole(),
    "seconds?": number(0),
    "weights?": PATH,
    f"{WEIGHTS}?": HASH,
    f"{PREVIOUS}?": optional(HASH),
    "lengthened?": [whole()],
    **dict.fromkeys(("version?", "code?", "torch?", "device?", "precision?"), WORDS),
}
PASSES = {
    "of": HASH,
    "checksum?": HASH,
    "passes": Map(WORDS, MATRIX),
}
BASE = {"record": {"settings": {"global batch?": whole(1)}}}
