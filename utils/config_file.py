"""JSON files of configuration → values by dotted key, each checked against the schema.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.config_schema import HYPERPARAMETER, RELEASED, SCHEMA, SECTIONS, key_of
from utils.errors import UserError, did_you_mean, listing, shortened
from utils.run_folder import run_of
from utils.text import decode, path_of

# What nobody writes by hand, and what would take minutes, or all memory, to read.
LARGEST_CONFIG = 1 << 20  # bytes
LARGEST_FILE = 1 << 27
DEEPEST = 32  # blocks and lists inside each other

# What a text has where JSON ends, by its beginning there → what is to be said of it.
NO_JSON = {
    r"//|/\*|#": "JSON has no comments; take it out",
    r",\s*[\]}]": "a comma before the end of a block or a list; JSON has none there, take it out",
    r"['‘’“”„]": 'text stands between straight double quotes, "…"',
    r"(True|False|None)\b": "JSON writes true, false and null",
    r"\\": "a backslash begins an escape; write / between folders, or two backslashes",
}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block = dict(pairs)
    if len(block) < len(pairs):
        key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise UserError(f"key '{shortened(key)}' stands twice in one block; keep one of them.")
    return block


def read_json(path: Path, what: str = "", largest: int = LARGEST_FILE) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        what: it is, for messages; a config file when empty.
        largest: bytes that it may have.

    Raises:
        UserError: the file is missing, unreadable, too large or nested too deep, or broken (with
            line and column).
    """
    source = f"{what} {path}".lstrip()
    try:
        with open(path, "rb") as file:
            content = file.read(largest + 1)  # of a device there is no end
        if len(content) > largest:
            raise UserError(f"{source}: the file cannot be read: it has over {largest >> 20} MiB.")
        text = decode(content)
    except FileNotFoundError:
        raise UserError(f"{what or 'config file'} {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what or 'config file'} {path} cannot be read: it is neither UTF-8 nor UTF-16 "
            f"({error}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{what or 'config file'} {path} cannot be read: {error}.") from None
    try:
        tree = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}, {_no_json(error)}.") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{source}: the file cannot be read: {error}.") from None
    level = [tree]
    for _ in range(DEEPEST):
        level = [each for item in level for each in _below(item) if isinstance(each, (dict, list))]
        if not level:
            return tree
    raise UserError(f"{source}: the file cannot be read: it is nested over {DEEPEST} deep.")


def _below(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def read_config(path: Path) -> Any:
    """Parse a config or a recipe.

    Raises:
        UserError: as `read_json`.
    """
    return read_json(path, largest=LARGEST_CONFIG)


def _no_json(error: json.JSONDecodeError) -> str:
    """Line, column and reason of what is no JSON, in the words of who wrote it."""
    text, place = error.doc, error.pos
    if text[place : place + 1] in ("]", "}"):  # Python 3.13 names the comma itself
        before = len(text[:place].rstrip()) - 1
        place = before if text[before : before + 1] == "," else place
    hints = (hint for start, hint in NO_JSON.items() if re.match(start, text[place:]))
    line, column = 1 + text.count("\n", 0, place), place - text.rfind("\n", 0, place)
    return f"line {line}, column {column}: not valid JSON: {next(hints, error.msg)}"


def flatten(
    tree: Any, source: str, *, strict: bool, blocks: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """A parsed JSON file as `{dotted key: value}`, each checked against `SCHEMA`.

    Args:
        tree: the parsed file.
        source: its name for messages.
        strict: an unknown key is an error; otherwise it is left out and told in the second result.
        blocks: what else may stand in the file, for the message about an unknown key.

    Raises:
        UserError: an unknown key (when strict), a wrong type or a value out of range.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{source}: the file must hold one JSON object, {{…}}.")
    values: dict[str, Any] = {}
    unknown: list[str] = []

    def visit(block: dict[str, Any], prefix: str) -> None:
        for name, value in block.items():
            dotted = prefix + name
            if dotted in SECTIONS and "." not in name:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {dotted} must be a block {{…}}.")
                visit(value, dotted + ".")
            elif "." not in name and (dotted in SCHEMA or prefix == "hyperparameter."):
                values[dotted] = check_value(dotted, value, source, here=strict)
            elif dotted in RELEASED:
                check_value(dotted, value, source)
            elif not strict:
                unknown.append(dotted)
            else:
                known = (*SCHEMA, *SECTIONS)
                below = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
                here = sorted({*(key.split(".")[0] for key in below), *(() if prefix else blocks)})
                elsewhere = [key for key in known if key.endswith(f".{name}")]
                hint = f" (did you mean '{elsewhere[0]}'?)" if len(elsewhere) == 1 else ""
                hint = hint or did_you_mean(name[:100], here)
                raise UserError(
                    f"{source}: unknown key '{shortened(dotted)}'{hint}; "
                    f"valid here: {listing(here) or 'nothing'}."
                )

    visit(tree, "")
    return values, unknown


def _no_path(text: str) -> str:
    """Why a text can be no path, in words; file systems refuse such, each in its own way."""
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return "it holds half a character"
    longest = max(map(len, parts))
    return f"{longest} bytes without a slash are more than the 255 of a name" * (longest > 255)


def check_value(dotted: str, value: Any, source: str, *, here: bool = True) -> Any:
    """Return `value` when the key `dotted` may hold it, a path as it is meant.

    Args:
        dotted: the key.
        value: as JSON gave it.
        source: where it stands, for messages.
        here: written on this machine; paths of another one are left as they are.

    Raises:
        UserError: naming the source, the key, the value and what is valid.
    """
    key = key_of(dotted)
    if key is HYPERPARAMETER and isinstance(value, (bool, str)):
        return value
    if not key.accepts(value) or (isinstance(value, str) and (not value or "\0" in value)):
        shown = shortened(repr(value) if isinstance(value, float) else json.dumps(value))
        raise UserError(f"{source}: {dotted} is {shown}, but must be {key.expected()}.")
    if key.plain_name and not re.fullmatch(r"[\w.+-]{1,100}", value):
        raise UserError(
            f"{source}: {dotted} is '{shortened(value)}', but it becomes a part of a folder name: "
            "use at most 100 letters, digits, '_', '-', '+' and '.'."
        )
    if isinstance(value, str) and (why := _no_path(value)):
        raise UserError(f"{source}: {dotted} is '{shortened(value)}', but {why}.")
    is_path = key.path and here and isinstance(value, str)
    return path_of(value, f"{source}: {dotted}") if is_path else value


def not_beside_weights(
    mode: str, resume: Path, beside: Mapping[str, Any], without: Mapping[str, Any]
) -> dict[str, Any]:
    """What a config beside the weights `resume` does not get to choose, and its value.

    Such a file may be downloaded, so folders that are written to, and where processes meet, are
    this machine's, and so is what it can bear. Weights that lie in the folder tree of a run are the
    user's own, whose results go beside them; training that continues there keeps its processes.
    Weights below this call's own save_dir have their links followed and their images loaded as in
    training. `beside` is what the file says, `without` what holds without it.
    """
    refused = {dotted: without[dotted] for dotted in SCHEMA if SCHEMA[dotted].local}
    folder = resume.resolve().parent
    loading = [dotted for dotted in refused if dotted.startswith("data_loader.args.")]
    run = run_of(folder)
    if run is None:
        return refused
    if run.save_dir == Path(without["trainer.save_dir"]).resolve():
        refused |= {dotted: beside.get(dotted, without[dotted]) for dotted in loading}
    if mode == "train":
        own = ("multiprocessing_distributed", "n_gpu", "fast.compile", *loading)
        refused |= {dotted: beside.get(dotted, without[dotted]) for dotted in own}
    refused["trainer.save_dir"] = str(run.save_dir)
    return refused
