"""Errors that a user can mend, as one sentence each, and the phrases they are made of."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.machine import address_space
from utils.processes import signals
from utils.processes.signals import EXIT_INTERRUPTED, Interrupted

EXIT_USER_ERROR = 2
# What is said, in exceptions of many kinds, where memory or address space ends: by allocators and
# libraries, and by the system, which then maps no library and starts no thread.
REFUSALS = re.compile(
    "out of memory|(can't|[Cc]annot|[Uu]nable to) allocate|not enough memory|bad_alloc|"
    "ALLOC_FAILED|failed to map segment|can't start new thread"
)


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
        text, code = last_words(error)
        print(text, file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        signals.ignore_signals()


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
    space = address_space()
    way = f"raise ulimit -v, which is {space >> 10}, or " if space is not None else ""
    return UserError(
        f"{who}there is too little memory ({first.rstrip('.')}); {way}lower the batch size "
        "(--batch_size; --accumulate keeps the global batch), the crop size or "
        "data_loader.args.num_workers; on CUDA, use_amp takes less."
    )


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
    texts = [str(name) for name in names]
    rest = f" and {len(texts) - most} more" if most is not None and len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


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


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
