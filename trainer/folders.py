"""The folders of a step before anything is written: whether they are free, writable, roomy."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from base.base_model import BaseModel
from trainer.optim import AVERAGES
from utils import checkpoint as files
from utils.checkpoint import StoredCheckpoint
from utils.errors import UserError
from utils.parse_config import ConfigParser
from utils.run_folder import REMOVED


def check_writable(config: ConfigParser) -> None:
    """Whether a step's folders can be written to.

    Raises:
        UserError: they cannot.
    """
    for folder in (config.step_dir(), config.log_dir()):
        try:
            folder = _existing(folder)
            with tempfile.TemporaryFile(dir=folder):  # asks the file system; leaves no trace
                pass
        except OSError as error:  # also a name that is too long, or a file in the way
            raise UserError(
                f"trainer.save_dir (--save_dir): nothing can be written to {folder}: "
                f"{error.strerror}; choose another."
            ) from None


def check_unoccupied(config: ConfigParser, resumed: StoredCheckpoint | None) -> None:
    """Whether the folder of a step is empty, or where the run of `-r FILE` stands.

    Args:
        resumed: that file.

    Raises:
        UserError: it holds another run, or one that is further.
    """
    folder, resume = config.step_dir(), config.call.resume
    last = folder / files.LAST
    removed = folder / REMOVED
    if not (last.is_file() or removed.is_file() or files.final_checkpoint(folder)):
        return
    if resume is None or resume.resolve().parent != folder.resolve():
        raise UserError(
            f"{folder} already holds a run; continue it with -r auto, evaluate it with --test if "
            "it is finished, choose another --name or --save_dir, or delete the folder."
        )
    newest, _ = files.newest_good(folder, resumed)
    if newest is not None and resume.resolve() != newest.path.resolve():
        raise UserError(
            f"-r {resume} is not where the run in {folder} stands; continue it with -r auto, or "
            "branch off from the older file with another --name."
        )


def check_room(folder: Path, needed: int, what: str) -> None:
    """Whether the file system of a folder has room for `needed` bytes.

    Args:
        what: needs them, for the message.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise UserError(
            f"trainer.save_dir (--save_dir): the file system of {folder} has {free >> 20} MiB "
            f"left, but {what} {needed >> 20} MiB; make room or choose another."
        )


def checkpoint_size(config: ConfigParser, model: BaseModel, *, finished: bool = False) -> int:
    """Bytes of a checkpoint, of what it mostly holds: weights and averages of the optimizer.

    That of a `finished` step has what `trainer.keep` leaves of them.
    """
    weights = 4 * sum(t.numel() for t in model.state_dict().values())
    if finished and config["trainer"]["keep"] != "all":
        return weights
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averages = len(AVERAGES[config["optimizer"]["type"]]) * trainable
    return weights + 4 * averages


def _existing(folder: Path) -> Path:
    """The nearest folder above (or this one) that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
