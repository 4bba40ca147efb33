"""Small tools that every layer may use: user errors, atomic files, seeds.

Knows nothing of tensors, so that command lines and JSON files are judged before torch is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from utils import interrupt
from utils.interrupt import EXIT_INTERRUPTED, Interrupted

PROJECT_ROOT = Path(__file__).resolve().parent.parent
EXIT_USER_ERROR = 2

BACKGROUND = 0  # label of every pixel without a (visible) class
VOID = 255  # label of pixels that no metric counts; in more bits, the largest number as well
WIDE_VOID = 65535  # its label id where an id of the data set needs 16 bits
PART = ".part"  # ending of files that are being written


class UserError(ValueError):
    """Something the user can mend, told in one line: what is wrong, where, what is valid.

    Attributes:
        kind: of a fault of the data, for the doctor (`scripts/check_data.py`), which collects them.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message.replace("\n", " "))  # a quoted value may hold a newline
        self.kind = kind


def escape_console() -> None:
    """Let this process write what its console cannot show as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a test or a notebook puts there
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a `UserError` into its one sentence on standard error and exit code 2.

    So does an error that says that memory has run out. A run that a signal stopped ends with
    `EXIT_INTERRUPTED`.
    """
    escape_console()
    try:
        yield
    except (Exception, Interrupted) as raised:
        error = foreseen(raised)
        if not isinstance(error, (UserError, Interrupted)):
            raise
        words, code = last_words(error)
        print(words, file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        interrupt.exiting()


# What is said, in exceptions of many kinds, where memory or address space ends: by allocators and
# libraries, and by the system, which then maps no library and starts no thread.
REFUSALS = re.compile(
    "out of memory|(can't|[Cc]annot|[Uu]nable to) allocate|not enough memory|bad_alloc|"
    "ALLOC_FAILED|failed to map segment|can't start new thread"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is too little memory."""
    return isinstance(error, MemoryError) or REFUSALS.search(str(error)) is not None


def foreseen(error: BaseException, who: str = "") -> BaseException:
    """`error`, or, when memory has run out, the `UserError` that says what to do.

    Args:
        who: has too little, at the beginning of the message, such as "rank 1: ".
    """
    if isinstance(error, (UserError, Interrupted)) or not out_of_memory(error):
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    space = _address_space()
    way = f"raise ulimit -v, which is {space >> 10}, or " if space is not None else ""
    return UserError(
        f"{who}there is too little memory ({first.rstrip('.')}); {way}lower the batch size "
        "(--batch_size; --accumulate keeps the global batch), the crop size or "
        "data_loader.args.num_workers; on CUDA, use_amp takes less."
    )


def _address_space() -> int | None:
    """Bytes of address space that a process may have (`ulimit -v`), where that is limited."""
    try:
        import resource
    except ImportError:  # no POSIX system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def last_words(error: BaseException) -> tuple[str, int]:
    """What a process prints that ends because of `error`, and its exit code."""
    program = Path(sys.argv[0]).name
    if isinstance(error, UserError):
        return f"{program}: error: {sentence(error)}", EXIT_USER_ERROR
    if isinstance(error, Interrupted):
        return f"{program}: {error}", EXIT_INTERRUPTED
    return "".join(traceback.format_exception(error)).rstrip(), 1


def sentence(error: UserError) -> str:
    """The message alone; a data loader's worker hands it over below a traceback."""
    return str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()


def listing(names: Iterable[object], most: int | None = None) -> str:
    """`a, b, c` for a message; beyond `most` names, how many more there are."""
    words = [str(name) for name in names]
    rest = f" and {len(words) - most} more" if most is not None and len(words) > most else ""
    return ", ".join(words[:most]) + rest


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text that is longer than `most`, for a message."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something valid is close to `name`, else an empty string."""
    near = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def choose(what: str, name: str, valid: Iterable[str]) -> str:
    """Return `name` when it is one of `valid`.

    Raises:
        UserError: with the valid names and the nearest match.
    """
    valid = list(valid)
    if name not in valid:
        shown = shortened(str(name))
        raise UserError(
            f"{what} is '{shown}', which does not exist{did_you_mean(shown, valid)}; "
            f"valid: {listing(valid)}."
        )
    return name


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never a half-written one.

    Raises:
        UserError: the file system refuses: it is full, read-only, or the folder may not be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files only their owner may read
        temporary.replace(path)
        _flush(path.parent)  # the rename itself
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; what it held before is intact."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder` or below it."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, data: object) -> None:
    """Write `data` as indented JSON, a list of numbers on one line, atomically."""
    text = json.dumps(data, indent=4, allow_nan=False)
    numbers = r"\[\n\s+([-\d.,e+\s]+?)\n\s+\]"
    text = re.sub(numbers, lambda row: f"[{' '.join(row[1].split())}]", text)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seed_from(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` alone, not on the process or the platform."""
    text = "\x1f".join(str(part) for part in parts).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def void_id(label_ids: Iterable[int]) -> int:
    """The label id of void in a data set with these: the largest number of 8 bits, or of 16."""
    return VOID if max(label_ids) < VOID else WIDE_VOID


def ranges(labels: Iterable[int], to: str = "-") -> str:
    """Label ids as `1-15, 17`, or `none`."""
    words: list[list[int]] = []
    for label in sorted(labels):
        if words and label == words[-1][-1] + 1:
            words[-1] = [words[-1][0], label]
        else:
            words.append([label])
    return listing((to.join(map(str, word)) for word in words), most=20) or "none"


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit() -> int | None:
    """Bytes that a process may have at most: of the machine, its container, its address space."""
    limits = [_address_space()]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no POSIX system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # no such container, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min((limit for limit in limits if limit is not None), default=None)


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of one image for the next; whoever reads many calls it.

    glibc returns freed memory to the system as soon as twice its largest block freed so far lies
    idle: after nearly every image, and taking it back, page by page, cost a third of a sample. One
    large block, freed untouched, ends that; a second one would be taken from what is kept.
    """
    bytes(16 << 20)
