"""Text and paths as people and their editors write them. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from utils.errors import UserError


def decode(content: bytes, errors: str = "strict") -> str:
    """The text of a file: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        UnicodeDecodeError: it is none of them.
    """
    return content.decode(json.detect_encoding(content), errors)


def lines_of(content: bytes) -> list[str]:
    """The lines of a list of names, whatever ends them.

    Names of files are bytes: what is no UTF-8 is kept, so that it names the file that has it.

    Raises:
        UnicodeDecodeError: half a character of UTF-16 or UTF-32.
    """
    # Not `splitlines`, which also splits at characters that a name may hold.
    return re.split(r"\r\n|\r|\n", decode(content, "surrogateescape"))


def path_of(text: str, what: str) -> str:
    """A path as it is meant: `~` and variables of the environment are what they stand for.

    Args:
        text: the path as it was written.
        what: where it was, for messages.

    Raises:
        UserError: it does not exist and is written in a way that cannot be meant.
    """
    path = os.path.expandvars(os.path.expanduser(text))
    if os.path.lexists(path):
        return path
    why = ""
    if not path:
        why = "which stands for nothing"
    elif path[0] in "'\"" or path[-1] in "'\"":
        why = "with quotes in it; leave them out"
    elif path != path.strip():
        why = "with blanks at its beginning or end; leave them out"
    elif path.startswith("~"):
        why = f"but the home folder of {path.split('/')[0]} is not known; write the whole path"
    elif variable := re.search(r"\$(\w+)|\$\{(.*?)\}", path):
        why = f"but the environment has no variable {variable[1] or variable[2]}; set it"
    elif os.sep == "/" and "\\" in path:
        why = "with backslashes; write / between folders"
    if why:
        raise UserError(f"{what} is '{text}', {why}.")
    return path


def path_argument(text: str) -> Path:
    """`path_of` as the type of an argument of `argparse`."""
    try:
        return Path(path_of(text, "the path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
