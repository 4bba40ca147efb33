"""Recipes: what is published for a method on a data set, as data.

`configs/recipes/METHOD_DATASET.json` holds `source`, `global_batch` (images of an iteration over
all processes), and blocks that have the form of a config: `every_step`, `step_0`, `later_steps`,
and under `tasks` the same three for single schedules. Later ones win: task over data set, steps
over `every_step`. Read by `utils/parse_config.py`; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.config_file import flatten, read_config
from utils.misc import PROJECT_ROOT, UserError, listing

FOLDER = PROJECT_ROOT / "configs" / "recipes"
BLOCKS = ("every_step", "step_0", "later_steps")


@dataclass(frozen=True)
class Recipe:
    """What a method's authors did at one step of a task.

    Attributes:
        file: where it stands, relative to the project.
        values: dotted key of the config → value.
        global_batch: images of one iteration, over all processes.
    """

    file: str
    values: Mapping[str, Any]
    global_batch: int


def read(method: str, dataset: str, task: str, step: int) -> Recipe | None:
    """The recipe of a method, if there is one for this data set (the short name), task and step.

    Raises:
        UserError: the file is faulty.
    """
    path = FOLDER / f"{method}_{dataset}.json"
    if not path.is_file():
        return None
    tree = read_config(path)
    known = {"source", "global_batch", "tasks", *BLOCKS}
    if wrong := [key for key in tree if key not in known]:
        raise UserError(f"{path}: unknown key '{wrong[0]}'; valid: {listing(sorted(known))}.")
    values: dict[str, Any] = {}
    for part in (tree, tree.get("tasks", {}).get(task, {})):
        for block in ("every_step", "later_steps" if step else "step_0"):
            values |= flatten(part.get(block, {}), f"{path}, {block}", strict=True)[0]
    return Recipe(path.relative_to(PROJECT_ROOT).as_posix(), values, tree["global_batch"])
