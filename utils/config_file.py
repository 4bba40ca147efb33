"""JSON files of configuration → values by dotted key, each checked against the schema.

Read by `utils/parse_config.py` and `utils/recipe.py`; imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from utils.config_schema import HYPERPARAMETER, RELEASED, SCHEMA, SECTIONS, key_of
from utils.misc import UserError, did_you_mean, listing
from utils.text import decode, path_of

# What a text has where JSON ends, by its beginning there → what is to be said of it.
NO_JSON = {
    r"//|/\*|#": "JSON has no comments; take it out",
    r",\s*[\]}]": "a comma before the end of a block or a list; JSON has none there, take it out",
    r"['‘’“”„]": 'text stands between straight double quotes, "…"',
    r"(True|False|None)\b": "JSON writes true, false and null",
    r"\\": "a backslash begins an escape; write / between folders, or two backslashes",
}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key '{key}' stands twice in one block; keep one of them.")
    return dict(pairs)


def read_json(path: Path, what: str = "config file") -> Any:
    """Parse the JSON file `path`; `what` it is, for messages.

    Raises:
        UserError: the file is missing, unreadable or broken (with line and column).
    """
    try:
        text = decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} cannot be read: it is neither UTF-8 nor UTF-16 ({error}); save it as "
            "UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error}.") from None
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, {_no_json(error)}.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{path}: the file cannot be read: {error}.") from None


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
                values[dotted] = check_value(dotted, value, source)
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
                raise UserError(
                    f"{source}: unknown key '{dotted}'{hint or did_you_mean(name, here)}; "
                    f"valid here: {listing(here) or 'nothing'}."
                )

    visit(tree, "")
    return values, unknown


def check_value(dotted: str, value: Any, source: str) -> Any:
    """Return `value` when the key `dotted` may hold it.

    Raises:
        UserError: naming the source, the key, the value and what is valid.
    """
    key = key_of(dotted)
    if key is HYPERPARAMETER and isinstance(value, (bool, str)):
        return value
    if not key.accepts(value) or (isinstance(value, str) and (not value or "\0" in value)):
        shown = repr(value) if isinstance(value, float) else json.dumps(value)
        raise UserError(f"{source}: {dotted} is {shown}, but must be {key.expected()}.")
    if key.plain_name and not re.fullmatch(r"[\w.+-]{1,100}", value):
        raise UserError(
            f"{source}: {dotted} is '{value}', but it becomes a part of a folder name: "
            "use at most 100 letters, digits, '_', '-', '+' and '.'."
        )
    return path_of(value, f"{source}: {dotted}") if key.path and isinstance(value, str) else value
