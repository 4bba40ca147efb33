"""What a run keeps of its finished steps (`trainer.keep`).

`all` keeps what training goes on from as well; `weights` the weights of every step; `last` those of
step 0, from which other runs start, and of the newest step. What is known of weights that were
removed stays in `REMOVED`, so that a later call sees a finished step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils import checkpoint as files
from utils.checkpoint_form import FORM, TRAINING_STATE
from utils.config_file import read_json
from utils.errors import UserError
from utils.files import write_json
from utils.forms import TEXT, fault
from utils.logger import log
from utils.parse_config import ConfigParser
from utils.run_folder import REMOVED

KNOWN = ("task", "method", "record", "previous")  # keys of the checkpoint


def strip_kept(folder: Path) -> None:
    """Take what training goes on from out of all checkpoints that a step keeps."""
    for path in (folder / files.BEST, *files.epoch_checkpoints(folder)):
        if path.is_file() and TRAINING_STATE & (content := files.load(path)).keys():
            files.save(without_state(content), path)


def without_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what training goes on from."""
    return {key: value for key, value in checkpoint.items() if key not in TRAINING_STATE}


def remove_earlier(config: ConfigParser) -> None:
    """Remove the weights of the steps between step 0 and this one, where `trainer.keep` is `last`.

    To be called when this step is tested.
    """
    task = config["data_loader"]["args"]["task"]
    if config["trainer"]["keep"] != "last" or task["joint"]:
        return
    for earlier in range(1, task["step"]):
        folder = config.step_dir(earlier)
        final = files.final_checkpoint(folder)
        if final is None:
            continue
        content = files.load(final)
        about = {key: content[key] for key in KNOWN if key in content}
        about |= {"checkpoint": final.name, "weights": files.weights_hash(content["state_dict"])}
        write_json(folder / REMOVED, about)
        for path in folder.glob("*.pth"):
            path.unlink()
        log.info("the weights of step %d are removed (trainer.keep is last)", earlier)


def read_removed(folder: Path) -> dict[str, Any] | None:
    """What is known of the weights of a finished step that were removed; None where none were.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / REMOVED
    if not path.is_file() or files.final_checkpoint(folder) is not None:
        return None
    content = read_json(path, "file")
    form = {"checkpoint": TEXT, "weights": TEXT} | {key: FORM[key] for key in KNOWN}
    if wrong := fault(content, form):
        raise UserError(f"{path}: {wrong}; delete the folder to train the step anew.")
    return content
