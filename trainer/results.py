"""The result of a step's test, `metrics.json`: which weights it is of, and where old ones go.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from utils.config_file import read_json
from utils.errors import UserError
from utils.logger import log
from utils.run_folder import REMOVED

METRICS = "metrics.json"
WEIGHTS = "weights_sha256"  # its key for the hash of the weights (`checkpoint.weights_hash`)
PREVIOUS = "previous_sha256"  # and for that of the previous step's, from which they were trained
PASSES = "protocol.json"  # further passes over the test images, beside it
EARLIER = "earlier"  # folders of old results are called earlier_1, earlier_2, …

# What is of the weights of a step, and what is of its whole training besides, in the two folders.
OF_WEIGHTS = (METRICS, PASSES)
OF_TRAINING = (
    *("history.json", "val", "events.out.tfevents.*"),
    *("*.pth", REMOVED, "memory.json", "base.json", "config.json"),
)


def tested_weights(metrics: Path) -> str | None:
    """The hash of the weights that a `metrics.json` is of; None where it does not tell."""
    try:
        content = read_json(metrics, "file")
    except UserError:
        return None
    name = content.get(WEIGHTS) if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def retire(folder: Path, *, trained_anew: bool) -> None:
    """Put results that are about to be of other weights into a folder `earlier_N` of their own.

    Args:
        folder: of a step, its log's or its checkpoints'.
        trained_anew: the training begins afresh, so that what tells of the one before goes as well.
    """
    patterns = (*OF_WEIGHTS, *(OF_TRAINING if trained_anew else ()))
    old = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not old:
        return
    numbers = [path.name.removeprefix(f"{EARLIER}_") for path in folder.glob(f"{EARLIER}_*")]
    number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
    target = folder / f"{EARLIER}_{number}"
    try:
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
    except OSError as error:
        raise UserError(
            f"the results of an earlier run in {folder} cannot be moved to {target}: "
            f"{error.strerror}; move them elsewhere, or choose another --name."
        ) from None
    log.info("results of an earlier run are kept in %s", target)
