"""Checkpoint files: written whole or not at all, verified when read, never able to run code.

A file is a zip archive as `torch.save` writes it, which holds a CRC-32 of each of its records.
torch itself does not look at them and loads damaged weights without a word; `load` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint_form import FORM, READ_BY_ALL, check_weights, not_finite
from utils.errors import UserError, first_line, listing
from utils.files import PART, atomic_path, remove_parts
from utils.forms import Maybe, fault, shown
from utils.logger import log

LAST = "last.pth"
PREVIOUS = "previous.pth"  # what last.pth was before
BEST = "model_best.pth"

# What a pickle of numbers and arrays of NumPy calls, by the names before and since NumPy 2. Other
# code keeps such numbers, a best value among them; they run nothing.
_MAKERS = {"scalar": np.float64(0), "_reconstruct": np.zeros(1)}
NUMPY: list[Any] = [
    *(np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}),
    *(
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, value in _MAKERS.items()
    ),
]


def epoch_file(epoch: int) -> str:
    """Name of the checkpoint that is kept of an epoch."""
    return f"checkpoint-epoch{epoch}.pth"


def save_last(folder: Path, checkpoint: dict[str, Any]) -> Path:
    """Write `last.pth` of a step folder; the one before stays as `previous.pth`.

    Raises:
        UserError: the file system refuses; both are as they were.
    """
    last = folder / LAST
    with atomic_path(last) as temporary:
        _write(checkpoint, temporary, last)
        if last.is_file():
            keep(last, PREVIOUS)
    return last


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, in the place of the one that may be there.

    Raises:
        UserError: as `save_last`.
    """
    with atomic_path(path) as temporary:
        _write(checkpoint, temporary, path)


def _write(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch.save(checkpoint, temporary)
    except RuntimeError as error:  # how torch tells that a write failed
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"checkpoint {path} cannot be written ({first_line(error)}); its file system has "
            f"{free:.0f} MiB left. Make room and continue with -r auto: the checkpoint before it "
            "is intact."
        ) from None


def keep(path: Path, name: str, folder: Path | None = None) -> None:
    """Let the checkpoint `path` also be known as `name` in its folder, without a second copy.

    Args:
        path: the checkpoint; it is never changed in place, so sharing is safe.
        folder: another folder for the name.
    """
    target = (folder or path.parent) / name
    temporary = target.with_name(f".{name}{PART}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # another file system, or one without hard links
        with atomic_path(target) as copy:
            shutil.copyfile(path, copy)
        return
    temporary.replace(target)


class StoredCheckpoint:
    """A checkpoint that is read when it is first asked for, and held until it is released.

    A copy in another process reads for itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self._content: dict[str, Any] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """As `load` gives it.

        Raises:
            UserError: as `load`.
        """
        if self._content is None:
            self._content = load(self.path)
        return self._content

    @property
    def finished(self) -> bool:
        """Whether its step is; released weights do not say, and theirs is."""
        return self.content.get("finished", True)

    def at(self, path: Path) -> StoredCheckpoint:
        """The checkpoint at `path`; what has been read, where it is another name of this file."""
        other = StoredCheckpoint(path)
        if path.samefile(self.path):
            other._content = self._content
        return other

    def release(self) -> None:
        """Give the memory back."""
        self._content = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_content": None}


class Damaged(UserError):
    """A file whose bytes are not those that were written, or whose weights are not finite."""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: tensors and plain values alone, and finite weights.

    Whether the weights fit a model is judged where they are loaded into one.

    Raises:
        UserError: the file is missing, or holds no weights, or something of another form.
        Damaged: its bytes are not those that were written, or its weights are not finite.
    """
    source = f"checkpoint {path}"
    checkpoint = read(path, source)
    if (
        isinstance(checkpoint, dict)
        and checkpoint
        and all(map(torch.is_tensor, checkpoint.values()))
    ):
        checkpoint = {"state_dict": checkpoint}  # as torch.save(model.state_dict(), path) leaves it
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        keys = listing(map(str, checkpoint), most=6) if isinstance(checkpoint, dict) else ""
        raise UserError(
            f"{source} holds no 'state_dict', the weights by name; it is {shown(checkpoint)}"
            f"{f' of {keys}' if keys else ''}; save the weights under that name, or alone."
        )
    check_weights(checkpoint["state_dict"], source)
    if faults := not_finite(checkpoint["state_dict"]):
        raise Damaged(f"{source} is of no use: {faults}.")
    if wrong := fault(checkpoint, {key: Maybe(FORM[key]) for key in READ_BY_ALL}):
        raise UserError(f"{source}: {wrong}.")
    return checkpoint


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and values, wherever they lie in memory.

    A prefix `module.` (DistributedDataParallel) is none of the names.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        about = f"{name.removeprefix('module.')} {tensor.dtype} {list(tensor.shape)}\n"
        digest.update(about.encode(errors="surrogateescape"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_of(path: Path) -> str:
    """`weights_hash` of the weights in a file, of which mostly nothing else is read.

    Raises:
        UserError: as `load`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return weights_hash(checkpoint["state_dict"])
    except Exception as error:  # an older format, other code's, or damage, which `load` tells
        log.debug("%s is read as a whole: %s", path, first_line(error))
        return weights_hash(load(path)["state_dict"])


def read(path: Path, source: str) -> Any:
    """What a file of `torch.save` holds, on the CPU: tensors and plain values, nothing else.

    Args:
        path: the file.
        source: what it is, for messages.

    Raises:
        UserError: it is missing, or may not be read.
        Damaged: its bytes are not those that were written, or it is another kind of file.
    """
    try:
        _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles of other protocols
            with torch.serialization.safe_globals(NUMPY):
                return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{source} does not exist.") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # torch reads what it did not write until anything at all fails
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise Damaged(
                f"{source} cannot be read as weights: it holds more than tensors and plain values, "
                f"namely {code[1]}, which could run code; it is not loaded. Where you trust it, "
                "save its 'state_dict' alone."
            ) from None
        why = _text(path) or _reason(error)
        raise Damaged(f"{source} cannot be read: {why}.") from None


def _plain(value: Any) -> Any:
    """A value with the numbers and arrays of NumPy in it as those of Python and torch."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {key: _plain(item) for key, item in items}
        return changed if isinstance(value, dict) else type(value)(changed.values())
    return value


def _verify(path: Path) -> None:
    """Compare the checksums of the archive; files older than torch 1.6 are none and have none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("damaged, its records claim more bytes than the file has")
        record = archive.testzip()
    if record is not None:
        raise zipfile.BadZipFile(f"damaged, the checksum of its record {record} is wrong")


def _text(path: Path) -> str:
    """That a file is empty or a text, in words; an empty string where it is neither."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "it is empty"
    text = start.decode("utf-8", "replace").rstrip("\ufffd")  # a letter may be cut in two
    line = text.lstrip().split("\n")[0].strip()
    if not line or not line.isprintable() or "\ufffd" in line:
        return ""
    return (
        f"it is a text that begins with '{line[:50]}'; if a download left it, fetch the file again"
    )


def _reason(error: Exception) -> str:
    """What is wrong with a damaged file, without torch's advice."""
    text = first_line(error).split(". ")[0]
    if isinstance(error, zipfile.BadZipFile) or "zip archive" in text or "EOF" in text:
        return text
    return "it is damaged, or no file of torch.save"


def newest_good(
    folder: Path, known: StoredCheckpoint | None = None
) -> tuple[StoredCheckpoint | None, list[str]]:
    """The newest checkpoint of a step folder that is whole, if any is.

    Args:
        known: one that may be among them, and has been read.

    Returns:
        The checkpoint, and a sentence for each damaged one that was skipped.
    """
    skipped: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS, *epoch_checkpoints(folder)):
        if path.is_file():
            stored = StoredCheckpoint(path) if known is None else known.at(path)
            try:
                _ = stored.content
                return stored, skipped
            except Damaged as error:
                skipped.append(f"skipped: {error}")
    return None, skipped


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The kept checkpoints of a step folder, the highest epoch first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-epoch*.pth")
        if (match := re.fullmatch(r"checkpoint-epoch(\d+)\.pth", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def final_checkpoint(folder: Path) -> Path | None:
    """The kept checkpoint of the highest epoch in a step folder."""
    return next(iter(epoch_checkpoints(folder)), None)


@contextlib.contextmanager
def claim(folder: Path, *others: Path) -> Iterator[None]:
    """Hold a folder for this process, and clear away what a killed one left half-written.

    The claim ends with the process, however it ends. File systems without locks go unprotected.

    Args:
        folder: of a step, or of an evaluation.
        others: further folders that are cleared, with all below them.

    Raises:
        UserError: another process writes there.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX system
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            # Not flock, which the loading processes of a killed run would hold for a while.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is writing to {folder}; wait until it has ended, or stop it, or "
                "choose another --name."
            ) from None
        except OSError as error:
            log.debug("%s cannot be locked: %s", folder, error)
        for each in (folder, *others):
            remove_parts(each)
        yield
