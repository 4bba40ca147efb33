"""Where the files of a run lie: one layout for training, evaluation, scripts and reports.

    SAVE_DIR/models/{setting}_{task}_{name}/step_N    checkpoints, config.json, memory.json
    SAVE_DIR/log/{setting}_{task}_{name}/step_N       info.log, metrics.json, history.json

Knows no configuration, and reads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MODELS, LOG = "models", "log"
REMOVED = "removed.json"  # what is known of weights that `trainer.keep` did not keep


@dataclass(frozen=True)
class RunFolder:
    """The folders of one run: `save_dir` of all runs, and its name."""

    save_dir: Path
    name: str

    def models(self, step: int) -> Path:
        """Folder of a step's checkpoints."""
        return self.save_dir / MODELS / self.name / f"step_{step}"

    def log(self, step: int) -> Path:
        """Folder of a step's log, figures and TensorBoard events."""
        return self.save_dir / LOG / self.name / f"step_{step}"


def is_step(folder: Path) -> bool:
    """Whether a folder has the name of a step's, such as step_0."""
    return re.fullmatch(r"step_\d+", folder.name) is not None


def run_of(folder: Path) -> RunFolder | None:
    """The run in whose layout a step's folder of checkpoints lies; None where it does not."""
    if not is_step(folder) or len(folder.parts) <= 3 or folder.parents[1].name != MODELS:
        return None
    return RunFolder(folder.parents[2], folder.parent.name)


def counterpart(folder: Path, kind: str) -> Path:
    """The `MODELS` or `LOG` folder that belongs to a run's, a step's, or one below it."""
    other = {MODELS: LOG, LOG: MODELS}[kind]
    for above in (folder, *folder.parents[:2]):
        if above.name == other:
            return above.with_name(kind) / folder.relative_to(above)
    return folder
