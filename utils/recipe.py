"""Values of a config by task and step: the blocks of a recipe, which a config file may hold, too.

The blocks `every_step`, `step_0`, `later_steps` have the form of a config; under `tasks` single
schedules have the same three. Later ones win: plain keys of the file, `every_step`, `step_0` or
`later_steps`, then those of the task. A recipe, `configs/recipes/METHOD_DATASET.json`, what is
published for a method on a data set, has blocks alone, beside `source` and `global_batch` (images
of an iteration over all processes). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.config_file import flatten, read_config
from utils.config_schema import OPTIONAL
from utils.errors import UserError, did_you_mean, listing
from utils.files import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "configs" / "recipes"
BLOCKS = ("every_step", "step_0", "later_steps")
OF_SOME_STEPS = BLOCKS[1:]
TASK = "data_loader.args.task"
# Of a recipe alone: where it is from, its batch, and whether BatchNorm saw all of that batch.
HEADING = ("source", "global_batch", "synchronised_bn")
# What says which blocks hold is known before a block is read.
CHOOSES_BLOCKS = {f"{TASK}.name", f"{TASK}.step", f"{TASK}.joint"}
# What the steps of a run have in common: its folder, its classes, its processes.
OF_ALL_STEPS = {
    *("name", "trainer.save_dir", "data_loader.type", "data_loader.args.class_names"),
    *(f"{TASK}.setting", f"{TASK}.steps"),
    *("n_gpu", "multiprocessing_distributed", "rank", "world_size", "dist_backend", "dist_url"),
}


class Part(NamedTuple):
    """Values of a file that hold together.

    Attributes:
        task: the schedule that they are for; None: every one.
        block: one of `BLOCKS`, or "" for plain keys.
        values: dotted key → value.
    """

    task: str | None
    block: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Layers:
    """What a file says, for every task and step.

    Attributes:
        source: the file, for messages.
        parts: in the order in which they are laid over one another.
    """

    source: str
    parts: tuple[Part, ...] = ()

    @property
    def plain(self) -> Mapping[str, Any]:
        """What stands outside of all blocks."""
        return next((part.values for part in self.parts if not part.block), {})

    @property
    def tasks(self) -> list[str]:
        """The schedules that have blocks, but for those that the blocks themselves define."""
        named = [part for part in self.parts if part.task is not None]
        own = {part.task for part in named if f"{TASK}.steps" in part.values}
        return [task for part in named if (task := part.task) is not None and task not in own]

    def at(self, task: str, step: int) -> list[Mapping[str, Any]]:
        """What holds at a step of a task; joint training is step 0."""
        blocks = ("", BLOCKS[0], OF_SOME_STEPS[step > 0])
        return [p.values for p in self.parts if p.task in (None, task) and p.block in blocks]

    def for_all(self, task: str) -> set[str]:
        """The keys that the file gives to all steps of a task, to none of them apart."""
        held = [part for part in self.parts if part.task in (None, task)]
        apart = {key for part in held if part.block in OF_SOME_STEPS for key in part.values}
        return {key for part in held for key in part.values} - apart


@dataclass(frozen=True)
class Recipe:
    """What a method's authors did at one step of a task.

    Attributes:
        file: where it stands, relative to the project.
        values: dotted key of the config → value.
        global_batch: images of one iteration, over all processes.
        by_step: the same keys at step 0 and at later steps.
        synchronised_bn: whether BatchNorm saw the global batch, or what one GPU had of it.
    """

    file: str
    values: Mapping[str, Any]
    global_batch: int
    by_step: tuple[Mapping[str, Any], Mapping[str, Any]]
    synchronised_bn: bool


def read(method: str, dataset: str, task: str, step: int) -> Recipe | None:
    """The recipe of a method, if there is one for this data set (the short name), task and step.

    Raises:
        UserError: the file is faulty.
    """
    path = FOLDER / f"{method}_{dataset}.json"
    if not path.is_file():
        return None
    tree = read_config(path)
    known = {*HEADING, "tasks", *BLOCKS}
    if wrong := [key for key in tree if key not in known]:
        raise UserError(f"{path}: unknown key '{wrong[0]}'; valid: {listing(sorted(known))}.")
    heading = {key: tree.pop(key) for key in HEADING if key in tree}
    batch, synchronised = heading.get("global_batch"), heading.get("synchronised_bn", True)
    if type(batch) is not int or batch < 1:
        raise UserError(f"{path}: global_batch must be there, a whole number >= 1.")
    if type(synchronised) is not bool:
        raise UserError(f"{path}: synchronised_bn must be true or false.")
    layers = _layers_of(tree, str(path))
    by_step = tuple(lay({}, layers.at(task, number), method) for number in (0, 1))
    file = path.relative_to(PROJECT_ROOT).as_posix()
    return Recipe(file, by_step[step > 0], batch, (by_step[0], by_step[1]), synchronised)


def read_layers(path: Path) -> Layers:
    """What a config file says.

    Raises:
        UserError: it cannot be read, or holds an unknown key or a wrong value, in whichever block.
    """
    return _layers_of(read_config(path), str(path))


def _layers_of(tree: Any, source: str) -> Layers:
    blocks = {}
    if isinstance(tree, dict):
        blocks = {key: tree[key] for key in ("tasks", *BLOCKS) if key in tree}
        tree = {key: value for key, value in tree.items() if key not in blocks}
    parts = [Part(None, "", flatten(tree, source, strict=True, blocks=("tasks", *BLOCKS))[0])]
    tasks = blocks.pop("tasks", {})
    _check_block(tasks, source, "tasks")
    parts += _parts(blocks, source, None)
    for task, held in tasks.items():
        where = f"tasks.{task}"
        _check_block(held, source, where)
        if wrong := [key for key in held if key not in BLOCKS]:
            raise UserError(
                f"{source}: unknown key '{wrong[0]}' in {where}{did_you_mean(wrong[0], BLOCKS)}; "
                f"valid here: {listing(BLOCKS)}."
            )
        parts += _parts(held, source, task)
    return Layers(source, tuple(parts))


def _parts(blocks: Mapping[str, Any], source: str, task: str | None) -> list[Part]:
    """What stands in the three blocks, of a task or of all."""
    parts = []
    for block in BLOCKS:
        if block not in blocks:
            continue
        where = block if task is None else f"tasks.{task}.{block}"
        _check_block(blocks[block], source, where)
        values, _ = flatten(blocks[block], f"{source}, {where}", strict=True)
        for key in values:
            if key in CHOOSES_BLOCKS or (key in OF_ALL_STEPS and block in OF_SOME_STEPS):
                raise UserError(
                    f"{source}, {where}: {key} is the same for all steps of a run; put it outside "
                    "of the blocks."
                )
        parts.append(Part(task, block, values))
    return parts


def _check_block(value: Any, source: str, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {where} must be a block {{…}}.")


def lay(
    below: Mapping[str, Any], layers: Iterable[Mapping[str, Any]], method: str | None = None
) -> dict[str, Any]:
    """The values of the layers of a file, one after the other, over those of `below`.

    A layer's settings are those of the method that the file named last. Of another method than
    `method`, where that is given, they are left out.
    """
    flat, named = dict(below), method
    for layer in layers:
        named = layer.get("method", named)
        if method is not None and named != method:
            layer = {k: v for k, v in layer.items() if not k.startswith("hyperparameter.")}
        flat = _over(flat, layer)
    return flat


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` over those of `below`.

    Arguments of a class mean nothing to another one that takes its place.
    """
    kept = dict(below)
    for dotted in OPTIONAL & below.keys():
        chosen = f"{dotted.split('.')[0]}.type"
        if above.get(chosen, below.get(chosen)) != below.get(chosen):
            del kept[dotted]
    return kept | dict(above)


def same_at_all_steps(
    recipe: Recipe,
    file: Layers,
    from_file: Mapping[str, Any],
    typed: Mapping[str, Any],
    task: str,
    kinds: set[int],
) -> list[str]:
    """What is given to all steps although the recipe has one value at step 0, another one later.

    Args:
        recipe: of the method and the task.
        file: what `-c` names.
        from_file: what holds of it.
        typed: the values of flags.
        task: the schedule.
        kinds: which steps are called for: 0, the first, 1, later ones, or both.

    Returns:
        A sentence each: key, where it is given, values, remedy.
    """
    first, later = recipe.by_step
    warnings, for_all = [], file.for_all(task)
    for key in (key for key in first if key in later and later[key] != first[key]):
        if key in typed and len(kinds) == 2:
            value, where = typed[key], "the command line"
            remedy = "call step 0 and the later steps one after the other, each with its own"
        elif key not in typed and key in for_all and key in from_file:
            value, where = from_file[key], file.source
            remedy = "put it into the blocks step_0 and later_steps of the file"
        else:
            continue
        if any(value != recipe.by_step[kind][key] for kind in kinds):
            warnings.append(
                f"{where} gives {key} to all steps: {_shown(value)}; {recipe.file} has "
                f"{_shown(first[key])} at step 0 and {_shown(later[key])} at later steps: {remedy}"
            )
    return warnings


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
