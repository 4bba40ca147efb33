"""The effective configuration: what a command line and the files that it names come to.

Read-only, and without torch, so a wrong flag or a broken file is answered at once. It knows every
key, but no class behind a `type` field: those names are resolved against registries.

A typed flag beats the file of `-c`, which beats the recipe of the method for this task and step,
which beats the defaults, the shipped config of the entry script. Where weights are named with `-r`,
the config beside them stands in the place of the recipe. Blocks of a file: `utils/recipe.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from utils import recipe as recipes
from utils.command_line import Call, read_options, typed_values
from utils.config_file import flatten, not_beside_weights, read_config
from utils.config_schema import SCHEMA, StepRange
from utils.errors import UserError, choose, listing, shortened
from utils.files import PROJECT_ROOT
from utils.recipe import TASK, Layers, Recipe, lay, read_layers, same_at_all_steps
from utils.run_folder import RunFolder
from utils.text import path_of

T = TypeVar("T")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        block = tree
        for parent in parents:
            block = block.setdefault(parent, {})
        block[leaf] = value
    for section in ("lr_scheduler", "evaluator"):  # the blocks that may be empty
        tree.setdefault(section, {}).setdefault("args", {})
    tree.setdefault("hyperparameter", {})
    return tree


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return value


@dataclass(eq=False, repr=False)
class ConfigParser:
    """The effective configuration of one run, read-only.

    `config["trainer"]["epochs"]` reads a key. What is no key of the file are attributes:

    Attributes:
        values: dotted key → value, given once and read with `flat`.
        call: what is to be done with it.
        cache_dir: folder of the class cache, `task.idxs_path` unless the file lay beside weights.
        beside: keys that only the file beside the weights sets, which may be another version's.
        recipe: of the method for this task and step, or None.
        global_batch: images of one iteration over all processes that the recipe asks for; None
            when the user chose the batch size of a process.
        tasks: file and name of each schedule for which a config file has blocks.
        sources: the layers that it was made of, of which `at_step` makes single steps.
        notes: what the log should say about how the configuration came about.
        warnings: what it should warn of, where there is more than one step.
    """

    values: InitVar[Mapping[str, Any]]
    call: Call = field(default_factory=Call)
    beside: Collection[str] = ()
    recipe: Recipe | None = None
    global_batch: int | None = None
    tasks: tuple[tuple[str, str], ...] = ()
    sources: _Sources | None = None
    cache_dir: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self, values: Mapping[str, Any]) -> None:
        self._tree = _nest(values)
        self.cache_dir = self.cache_dir or self["data_loader"]["args"]["task"]["idxs_path"]

    def __getitem__(self, name: str) -> Any:
        return _frozen(self._tree[name])

    def at_step(self, step: int) -> ConfigParser:
        """The same command line for one step, which starts or goes on by itself (`-r auto`)."""
        assert self.sources is not None, "only a command line has further steps"
        return self.sources.config(step)

    def with_values(self, values: Mapping[str, Any]) -> ConfigParser:
        """A copy with other values of some keys; `hyperparameter` is replaced as a whole."""
        return replace(self, values={**self.flat(), **values})

    def noted(self, *notes: str) -> ConfigParser:
        """A copy with further notes."""
        return replace(self, values=self.flat(), notes=(*self.notes, *notes))

    def flat(self) -> dict[str, Any]:
        """Dotted key → value, in the order of the schema; keys of `hyperparameter` come last."""
        values = {}
        for dotted in (*SCHEMA, *(f"hyperparameter.{name}" for name in self["hyperparameter"])):
            with contextlib.suppress(KeyError):  # an optional one
                values[dotted] = reduce(getitem, dotted.split("."), self._tree)
        return values

    def as_dict(self) -> dict[str, Any]:
        """A private, writable copy, for `config.json`."""
        return json.loads(json.dumps(self._tree))

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run, which its steps share."""
        task = self["data_loader"]["args"]["task"]
        joint = "-joint" if task["joint"] else ""
        name = f"{task['setting']}_{task['name']}_{self['name']}{joint}"
        return RunFolder(Path(self["trainer"]["save_dir"]), name)

    def step_dir(self, step: int | None = None) -> Path:
        """Folder of the checkpoints of `step` (default: this step)."""
        return self.run_folder.models(self._step if step is None else step)

    def log_dir(self, step: int | None = None) -> Path:
        """Folder of the log, the metrics and the TensorBoard events of `step`."""
        return self.run_folder.log(self._step if step is None else step)

    @property
    def _step(self) -> int:
        return self["data_loader"]["args"]["task"]["step"]

    def resolve(self, section: str, registry: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
        """The class that `section.type` names, after checking that it takes `section.args`.

        Raises:
            UserError: an unknown name, or an argument that this class does not have.
        """
        block = self[section]
        cls = registry[choose(f"{section}.type", block["type"], registry)]
        accepted = inspect.signature(cls).parameters
        for name in block["args"]:
            if name not in accepted:
                own = (key for key in SCHEMA if key.startswith(f"{section}.args."))
                valid = listing(word for key in own if (word := key.split(".")[2]) in accepted)
                raise UserError(
                    f"{section}.args.{name} is no argument of {block['type']}; "
                    f"valid: {valid or 'none'}."
                )
        return cls

    def build(
        self, section: str, registry: Mapping[str, Callable[..., T]], *args: Any, **kwargs: Any
    ) -> T:
        """An object of the class that `section.type` names, from `section.args` and the rest."""
        return self.resolve(section, registry)(*args, **self[section]["args"], **kwargs)

    @classmethod
    def from_args(
        cls,
        mode: str,
        default_config: str,
        description: str | None = None,
        argv: Sequence[str] | None = None,
        settings_help: Callable[[str], str] | None = None,
    ) -> ConfigParser:
        """Parse the command line of an entry script.

        Args:
            mode: "train" or "eval".
            default_config: the shipped config of this script, relative to the project.
            description: text of `--help`.
            argv: the arguments; default: those of the process.
            settings_help: name of a method → its settings as text, for `--method NAME --help`.

        Raises:
            UserError: whatever is wrong with a flag or a file, in one sentence.
        """
        options = read_options(mode, description, argv, settings_help)
        return _read_sources(mode, default_config, options).config()


@dataclass(frozen=True)
class _Sources:
    """What a command line and the files that it names say: the layers of a configuration.

    Attributes:
        call: what is to be done.
        default_config: the shipped config, relative to the project.
        shipped, file: the config of the script, and that of `-c`.
        beside: what the config beside the weights of `-r` says; None where there is none.
        typed: the values of flags.
        notes: for the log.
    """

    call: Call
    default_config: str
    shipped: Layers
    file: Layers
    beside: Mapping[str, Any] | None
    typed: Mapping[str, Any]
    notes: tuple[str, ...]

    def config(self, step: int | None = None) -> ConfigParser:
        """The effective configuration, of one of several steps where `step` names it."""
        typed = self.typed if step is None else {**self.typed, f"{TASK}.step": step}
        beside, notes = dict(self.beside or {}), list(self.notes)
        # Outside of the blocks stands which task and step it is, and so which blocks hold.
        of_task = {**self.shipped.plain, **beside, **self.file.plain, **typed}
        task, joint = of_task[f"{TASK}.name"], of_task[f"{TASK}.joint"]
        at = (task, 0 if joint else of_task[f"{TASK}.step"])
        defaults, given = lay({}, self.shipped.at(*at)), lay({}, self.file.at(*at))
        chosen = given.keys() | typed.keys()
        without = {**defaults, **given, **typed}  # what holds without weights and recipe
        recipe, warnings = None, list[str]()
        mode, resume = self.call.mode, self.call.resume
        if self.beside is not None and resume is not None:
            beside.update(not_beside_weights(mode, resume, beside, without))
            beside.setdefault("method", defaults["method"])  # of files older than the key
        elif mode == "train":
            recipe = recipes.read(without["method"], self._data_set, *at)
        method = {**defaults, **beside, **given, **typed}["method"]
        above = recipe.values if recipe else beside
        flat: dict[str, Any] = {}
        for layers in (self.shipped.at(*at), [above], self.file.at(*at), [typed]):
            flat = lay(flat, layers, method)
        flat["method"] = method
        if recipe is not None:
            used = [key for key, value in recipe.values.items() if flat.get(key) == value]
            values = listing(f"{key} {flat[key]}" for key in used)
            notes.append(f"recipe: {recipe.file}: {values}")
            if not joint:
                kinds = (self.call.steps or StepRange(at[1], at[1])).kinds
                held = lay({}, self.file.at(*at), method)
                warnings = same_at_all_steps(recipe, self.file, held, typed, task, kinds)
        elif mode == "train" and self.beside is None:
            notes.append(self._no_recipe(without["method"]))
        self._check_data_set(flat["data_loader.type"], defaults["data_loader.type"])
        lists, batch = f"{TASK}.idxs_path", "data_loader.args.train.batch_size"
        return ConfigParser(
            flat,
            call=self.call if step is None else self.call.at_step(step),
            beside=beside.keys() - chosen,
            recipe=recipe,
            global_batch=recipe.global_batch if recipe and batch not in chosen else None,
            tasks=tuple((f.source, name) for f in (self.shipped, self.file) for name in f.tasks),
            sources=self,
            cache_dir=defaults[lists] if lists in beside.keys() - chosen else flat[lists],
            notes=tuple(notes),
            warnings=tuple(warnings),
        )

    @property
    def _data_set(self) -> str:
        return Path(self.default_config).stem.removeprefix("config_")

    def _no_recipe(self, method: str) -> str:
        missing = f"configs/recipes/{method}_{self._data_set}.json"
        return (
            f"recipe: none, for there is no {missing}; what neither -c nor a flag gives is as in "
            f"{self.default_config}"
        )

    @staticmethod
    def _check_data_set(given: str, shipped: str) -> None:
        if given != shipped:
            raise UserError(
                f"data_loader.type is '{given}', but this script is for '{shipped}'; correct it, "
                "or call that data set's script."
            )


def _read_sources(mode: str, default_config: str, options: Mapping[str, Any]) -> _Sources:
    """Read the files that a command line names."""
    shipped, file = read_layers(PROJECT_ROOT / default_config), Layers("")
    call, notes = Call.of(mode, options), list[str]()
    if options["config"] is not None:
        file = read_layers(Path(path_of(options["config"], "-c/--config")))
        notes.append(f"config: {options['config']}")
    typed, steps = typed_values(options)
    call = replace(call, steps=steps)
    path = None if call.resume is None else call.resume.parent / "config.json"
    beside = None
    if path is not None and path.is_file():
        beside, unknown = flatten(read_config(path), str(path), strict=False)
        notes.append(f"config: {path}, which lies beside the weights")
        if unknown:
            names = listing(map(shortened, unknown), most=20)
            notes.append(f"ignored, for this version has no such keys: {names}")
    elif mode == "eval" and not notes:
        raise UserError(
            f"there is no config.json beside {call.resume}; name these weights' config with -c."
        )
    notes = notes or [f"config: {default_config}"]
    return _Sources(call, default_config, shipped, file, beside, typed, tuple(notes))
