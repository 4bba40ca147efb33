"""Command line and JSON file → one checked, read-only configuration.

Called by the four entry scripts before anything else; imports no torch, so a wrong flag or a broken
file is answered at once. It knows every key and every flag, but no class behind a `type` field:
those names are resolved against the registries that `trainer/run.py` hands to `ConfigParser`.

A typed flag beats the file of `-c`, which beats the recipe of the method for this task and step,
which beats the defaults, the shipped config of the entry script. Where weights are named with `-r`,
the config beside them stands in the place of the recipe. What a file says for this task and step,
also in blocks of its own, is the matter of `utils/recipe.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from utils import recipe as recipes
from utils.config_file import check_value, flatten, read_config
from utils.config_schema import FLAGS, SCHEMA, Steps, key_of
from utils.errors import UserError, choose, did_you_mean, listing, shortened
from utils.files import PROJECT_ROOT
from utils.recipe import TASK, Layers, Recipe, lay, read_layers, same_at_all_steps
from utils.text import path_of

T = TypeVar("T")
SETTINGS_HINT = "settings of a method, the block hyperparameter: --method NAME --help"


class _ArgumentParser(argparse.ArgumentParser):
    """argparse that reports in one sentence instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += did_you_mean(message.split()[2].split("=")[0], self._option_string_actions)
        raise UserError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help.")


def _argument_parser(
    mode: str, description: str | None, epilog: str | None
) -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    metavars: dict[Callable[[str], Any], str] = {int: "N", float: "X", str: "TEXT"}
    add(
        "-c",
        "--config",
        metavar="FILE",
        help="JSON config, over the one beside the weights of -r and over the shipped one",
    )
    if mode == "train":
        add(
            "-r",
            "--resume",
            metavar="FILE|auto",
            help="checkpoint to continue from; auto: the "
            "newest good one of the step, or a fresh start; a finished step is left alone",
        )
        add(
            "--base",
            metavar="DIR",
            help="take the finished step 0 of another run from its folder "
            "DIR, when everything that decides its weights is equal",
        )
        add("--test", action="store_true", help="evaluate the trained step, do not train")
    else:
        add("-r", "--resume", metavar="FILE", required=True, help="weights to evaluate")
        add("--test", action="store_true", help="accepted for old scripts: this always tests")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any key of the config, such as hyperparameter.kd=10, as often as needed",
    )
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    add("-d", "--device", metavar="IDS", help="GPU ids, such as 0 or 0,1; cpu: no GPU")
    for flag in FLAGS:
        if mode == "eval" and not flag.eval_too:
            continue
        doc = f"{flag.key}: {key_of(flag.key).doc}".replace("%", "%%")
        if flag.convert is None:
            add(*flag.names, dest=flag.key, help=doc, action=argparse.BooleanOptionalAction)
        else:
            metavar = metavars.get(flag.convert, "N|all|N-N")
            add(*flag.names, dest=flag.key, help=doc, type=flag.convert, metavar=metavar)
    return parser


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
        mode: "train" or "eval".
        resume: the checkpoint of `-r`, or None.
        auto: `-r auto` was given; `trainer/run.py` looks for the checkpoint.
        base: the step folder of `--base`, or None.
        cache_dir: folder of the class cache, `task.idxs_path` unless the file lay beside weights.
        device: the text of `-d`, or None.
        test: whether `--test` was given.
        beside: keys that only the file beside the weights sets, which may be another version's.
        steps: what `--task_step` named when it was not one step; `at_step` gives the single ones.
        launch: the same, also of a single step that `at_step` gave.
        recipe: of the method for this task and step, or None.
        global_batch: images of one iteration over all processes that the recipe asks for; None
            when the user chose the batch size of a process.
        tasks: file and name of each schedule for which a config file has blocks.
        again: a step → what the command line means for it alone; of no copy in a process.
        notes: what the log should say about how the configuration came about.
        warnings: what it should warn of, where there is more than one step.
    """

    values: InitVar[Mapping[str, Any]]
    mode: str = "train"
    resume: Path | None = None
    auto: bool = False
    base: Path | None = None
    device: str | None = None
    test: bool = False
    beside: Collection[str] = ()
    steps: Steps | None = None
    launch: Steps | None = None
    recipe: Recipe | None = None
    global_batch: int | None = None
    tasks: tuple[tuple[str, str], ...] = ()
    again: Callable[[int], ConfigParser] | None = None
    cache_dir: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self, values: Mapping[str, Any]) -> None:
        self._tree = _nest(values)
        self.cache_dir = self.cache_dir or self["data_loader"]["args"]["task"]["idxs_path"]

    def __getitem__(self, name: str) -> Any:
        return _frozen(self._tree[name])

    def __getstate__(self) -> dict[str, Any]:
        # The processes of a distributed run get a copy, and a closure cannot be pickled.
        return vars(self) | {"again": None}

    def at_step(self, step: int) -> ConfigParser:
        """The same command line for one step, which starts or goes on by itself (`-r auto`)."""
        assert self.again is not None, "only a command line has further steps"
        return self.again(step).changed(
            auto=self.resume is None, base=self.base if step == 0 else None
        )

    def with_values(self, values: Mapping[str, Any]) -> ConfigParser:
        """A copy with other values of some keys; `hyperparameter` is replaced as a whole."""
        return replace(self, values={**self.flat(), **values})

    def changed(self, *, notes: Sequence[str] = (), **attributes: Any) -> ConfigParser:
        """A copy with other attributes (`resume`, `test`) and further notes."""
        return replace(self, values=self.flat(), notes=(*self.notes, *notes), **attributes)

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
    def experiment(self) -> str:
        """`{setting}_{task}_{name}`, the folder that the steps of one run share."""
        task = self["data_loader"]["args"]["task"]
        joint = "-joint" if task["joint"] else ""
        return f"{task['setting']}_{task['name']}_{self['name']}{joint}"

    def step_dir(self, step: int | None = None) -> Path:
        """Folder of the checkpoints of `step` (default: this step)."""
        return self._folder("models", step)

    def log_dir(self, step: int | None = None) -> Path:
        """Folder of the log, the metrics and the TensorBoard events of `step`."""
        return self._folder("log", step)

    def _folder(self, kind: str, step: int | None) -> Path:
        step = self["data_loader"]["args"]["task"]["step"] if step is None else step
        return Path(self["trainer"]["save_dir"]) / kind / self.experiment / f"step_{step}"

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
        launch: Steps | None = None,
    ) -> ConfigParser:
        """Parse the command line of an entry script.

        Args:
            mode: "train" or "eval".
            default_config: the shipped config of this script, relative to the project.
            description: text of `--help`.
            argv: the arguments; default: those of the process.
            settings_help: name of a method → its settings in words, for `--method NAME --help`.
            launch: the steps that are called for together, when this is one of them.

        Raises:
            UserError: whatever is wrong with a flag or a file, in one sentence.
        """
        words = sys.argv[1:] if argv is None else list(argv)
        epilog = None
        if settings_help is not None and {"-h", "--help"} & {*words}:
            named = [after for word, after in pairwise(words) if word == "--method"]
            epilog = settings_help(named[-1]) if named else SETTINGS_HINT
        args = vars(_argument_parser(mode, description, epilog).parse_args(words))
        _check_local_rank(args["local_rank"])
        shipped = read_layers(PROJECT_ROOT / default_config)

        notes: list[str] = []
        auto = mode == "train" and args["resume"] == "auto"
        resume = (
            None if auto or args["resume"] is None else Path(path_of(args["resume"], "-r/--resume"))
        )
        if resume is not None and not resume.is_file():
            raise UserError(f"-r/--resume: there is no file {resume}.")
        file = Layers("")
        if args["config"] is not None:
            file = read_layers(Path(path_of(args["config"], "-c/--config")))
            notes.append(f"config: {args['config']}")
        typed, steps = _typed(args)
        launch = launch or steps
        beside = None if resume is None else resume.parent / "config.json"
        theirs: dict[str, Any] = {}
        if beside is not None and beside.is_file():
            theirs, unknown = flatten(read_config(beside), str(beside), strict=False)
            notes.append(f"config: {beside}, which lies beside the weights")
            if unknown:
                names = listing(map(shortened, unknown), most=20)
                notes.append(f"ignored, for this version has no such keys: {names}")
        else:
            beside = None
            if mode == "eval" and not notes:
                raise UserError(
                    f"there is no config.json beside {resume}; name these weights' config with -c."
                )
        notes = notes or [f"config: {default_config}"]

        # Outside of the blocks stands which task and step it is, and so which blocks hold.
        of_task = {**shipped.plain, **theirs, **file.plain, **typed}
        task, joint = of_task[f"{TASK}.name"], of_task[f"{TASK}.joint"]
        step = 0 if joint else of_task[f"{TASK}.step"]
        defaults, given = lay({}, shipped.at(task, step)), lay({}, file.at(task, step))
        own = given.keys() | typed.keys()
        mine = {**defaults, **given, **typed}
        recipe = None
        if beside is not None and resume is not None:
            theirs.update(_not_beside_weights(mode, resume, theirs, mine))
            theirs.setdefault("method", defaults["method"])  # of files older than the key
        elif mode == "train":
            dataset = Path(default_config).stem.removeprefix("config_")
            recipe = recipes.read(mine["method"], dataset, task, step)
            if recipe is None:
                missing = f"configs/recipes/{mine['method']}_{dataset}.json"
                notes.append(
                    f"recipe: none, for there is no {missing}; what neither -c nor a flag gives is "
                    f"as in {default_config}"
                )

        method = {**defaults, **theirs, **given, **typed}["method"]
        above = recipe.values if recipe else theirs
        flat: dict[str, Any] = {}
        for layers in (shipped.at(task, step), [above], file.at(task, step), [typed]):
            flat = lay(flat, layers, method)
        flat["method"] = method
        warnings: list[str] = []
        if recipe is not None:
            kept = [key for key, value in recipe.values.items() if flat.get(key) == value]
            used = listing(f"{key} {flat[key]}" for key in kept)
            notes.append(f"recipe: {recipe.file}: {used}")
            if not joint:
                called = _kinds(launch or Steps(step, step))
                held = lay({}, file.at(task, step), method)
                warnings = same_at_all_steps(recipe, file, held, typed, task, called)
        bundle = "data_loader.type"
        if flat[bundle] != defaults[bundle]:
            raise UserError(
                f"{bundle} is '{flat[bundle]}', but this script is for '{defaults[bundle]}'; "
                "correct it, or call that data set's script."
            )
        lists, batch = f"{TASK}.idxs_path", "data_loader.args.train.batch_size"
        return cls(
            flat,
            mode=mode,
            resume=resume,
            auto=auto,
            base=None if args.get("base") is None else Path(path_of(args["base"], "--base")),
            device=args["device"],
            test=args["test"] or mode == "eval",
            beside=theirs.keys() - own,
            steps=steps,
            launch=launch,
            recipe=recipe,
            global_batch=recipe.global_batch if recipe and batch not in own else None,
            tasks=tuple((each.source, name) for each in (shipped, file) for name in each.tasks),
            again=lambda step: cls.from_args(
                mode,
                default_config,
                description,
                [*words, "--task_step", str(step)],
                launch=launch,
            ),
            cache_dir=defaults[lists] if lists in theirs.keys() - own else flat[lists],
            notes=tuple(notes),
            warnings=tuple(warnings),
        )


def _check_local_rank(number: int | None) -> None:
    """What the old launcher, torch.distributed.launch, gives each process besides variables.

    Raises:
        UserError: there are no such variables, or they say something else.
    """
    variable = os.environ.get("LOCAL_RANK")
    if number is not None and variable != str(number):
        there = "is not set" if variable is None else f"is {variable}"
        raise UserError(
            f"--local-rank is {number}, but the variable LOCAL_RANK, which decides, {there}; start "
            f"the processes with torchrun --nproc_per_node N {Path(sys.argv[0]).name} …, without "
            "--local-rank."
        )


def _kinds(steps: Steps) -> set[int]:
    """Which of the two kinds of steps that recipes tell apart: 0, the first, and 1, later ones."""
    last = 1 if steps.last is None else steps.last
    return {min(steps.first, 1), min(last, 1)}


def _typed(args: Mapping[str, Any]) -> tuple[dict[str, Any], Steps | None]:
    """The values of the typed flags, and the steps where `--task_step` names several."""
    values: dict[str, Any] = {}
    steps = None
    for words in args["set"]:
        values |= _assigned(words)
    for flag in FLAGS:
        value = args.get(flag.key)
        if isinstance(value, Steps):
            steps, value = value, value.first
        if value is not None:
            values[flag.key] = check_value(flag.key, value, f"flag {flag.names[-1]}")
    if steps is not None and args.get("resume") not in (None, "auto"):
        raise UserError(
            "-r FILE is of one step, but --task_step names several; in training every one of them "
            "goes on by itself where it stands, so leave -r out."
        )
    return values, steps


def _assigned(words: str) -> dict[str, Any]:
    """The key and the value of a `--set`; what is no JSON is text."""
    dotted, sign, text = words.partition("=")
    if not sign:
        raise UserError(f"--set {words}: give KEY=VALUE, such as hyperparameter.kd=10.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if dotted in SCHEMA and str in SCHEMA[dotted].types and not SCHEMA[dotted].accepts(value):
        value = text  # a name such as 2012
    tree = value
    for name in reversed(dotted.split(".")):
        tree = {name: tree}
    return flatten(tree, f"--set {words}", strict=True)[0]


def _not_beside_weights(
    mode: str, resume: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]
) -> dict[str, Any]:
    """What a config beside the weights `resume` does not get to choose, and its value.

    Such a file may be downloaded, so folders that are written to, and where processes meet, are
    this machine's, and so is what it can bear. Weights that lie in the folder tree of a run are the
    user's own, whose results go beside them; training that continues there keeps its processes.
    Weights below this call's own save_dir have their links followed and their images loaded as in
    training. `theirs` is what the file says, `mine` what holds without it.
    """
    refused = {dotted: mine[dotted] for dotted in SCHEMA if SCHEMA[dotted].local}
    folder = resume.resolve().parent
    loading = [dotted for dotted in refused if dotted.startswith("data_loader.args.")]
    in_runs = re.fullmatch(r"step_\d+", folder.name) and len(folder.parts) > 3
    if not in_runs or folder.parents[1].name != "models":
        return refused
    runs = folder.parents[2]
    if runs == Path(mine["trainer.save_dir"]).resolve():
        refused |= {dotted: theirs.get(dotted, mine[dotted]) for dotted in loading}
    if mode == "train":
        own = ("multiprocessing_distributed", "n_gpu", "fast.compile", *loading)
        refused |= {dotted: theirs.get(dotted, mine[dotted]) for dotted in own}
    refused["trainer.save_dir"] = str(runs)
    return refused
