"""Command line and JSON file → one checked, read-only configuration.

Called by the four entry scripts before anything else; imports no torch, so a wrong flag or a broken
file is answered at once. It knows every key and every flag, but no class behind a `type` field:
those names are resolved against the registries that `trainer/run.py` hands to `ConfigParser`.

A typed flag beats the file, the file beats the defaults; the defaults are the shipped config of the
entry script.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.misc import UserError, choose, did_you_mean, listing

PROJECT_ROOT = Path(__file__).resolve().parent.parent

NUMBER = (int, float)
NULL = type(None)


@dataclass(frozen=True)
class Key:
    """What a leaf of the JSON file may hold."""

    doc: str
    types: tuple[type, ...]
    least: float | None = None  # inclusive
    above: float | None = None  # exclusive
    most: float | None = None  # inclusive
    choices: tuple[Any, ...] = ()
    plain_name: bool = False  # becomes a part of a folder name
    items: str = ""  # what a list holds, for the message

    def expected(self) -> str:
        """What is valid here, as words for a message."""
        if self.choices:
            return "one of " + listing(json.dumps(choice) for choice in self.choices)
        names = {str: "a string", bool: "true or false", int: "a whole number", NULL: "null"}
        words = [names[kind] for kind in self.types if kind in names and kind is not int]
        if float in self.types:
            words.insert(0, "a number")
        elif int in self.types:
            words.insert(0, "a whole number")
        if list in self.types:
            words.insert(0, f"a list of {self.items}")
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", self.least), (">", self.above), ("<=", self.most))
            if bound is not None
        ]
        return " or ".join(words) + (f" {' and '.join(bounds)}" if bounds else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value`, as JSON gave it, may stand here."""
        if isinstance(value, bool) and bool not in self.types:
            return False
        if not isinstance(value, self.types):
            return False
        if isinstance(value, NUMBER) and not isinstance(value, bool):
            if not math.isfinite(value):
                return False
            if self.least is not None and value < self.least:
                return False
            if self.above is not None and value <= self.above:
                return False
            if self.most is not None and value > self.most:
                return False
        return not self.choices or value in self.choices


def _split(kind: str) -> dict[str, Key]:
    """The keys of one of the blocks `train`, `val`, `test` of `data_loader.args`."""
    where = f"data_loader.args.{kind}"
    images = {"train": "training", "val": "validation", "test": "test"}[kind]
    return {
        f"{where}.args.transform": Key(
            f"resize and crop the {images} images; false: keep them whole", (bool,)
        ),
        f"{where}.args.transform_args.crop_size": Key("side of the crop in pixels", (int,), 1),
        f"{where}.args.masking_value": Key(
            f"label of hidden classes in {images} masks: 0 background, 255 not counted",
            (int,),
            choices=(0, 255),
        ),
        f"{where}.batch_size": Key("images per process and iteration", (int,), 1),
    }


# Every key of a config file, in the order of the shipped files, with what it means. Keys below
# `hyperparameter` are the method's own: their names are checked where the methods are known.
SCHEMA: dict[str, Key] = {
    "name": Key("name of the run, a part of its folder's name", (str,), plain_name=True),
    "method": Key("which method of trainer/methods trains the step", (str,)),
    "n_gpu": Key("processes started on a machine without CUDA", (int,), 1),
    "multiprocessing_distributed": Key("one process per GPU (without CUDA: n_gpu)", (bool,)),
    "rank": Key("number of this node", (int,), 0),
    "world_size": Key("number of nodes", (int,), 1),
    "dist_backend": Key("process group on CUDA (CPU: gloo)", (str,), choices=("nccl", "gloo")),
    "dist_url": Key("where the processes meet, tcp://HOST:PORT", (str,)),
    "seed": Key("seed of weights, samples and order", (int,), 0, most=2**63 - 1),
    "use_amp": Key("mixed precision on CUDA", (bool,)),
    "amp_dtype": Key("its data type", (str,), choices=("float16", "bfloat16")),
    "arch.type": Key("the model's class", (str,)),
    "arch.args.backbone": Key("resnet50, resnet101, resnet152 or tiny (CPU demos, tests)", (str,)),
    "arch.args.output_stride": Key("image size over feature size", (int,), choices=(8, 16)),
    "arch.args.norm_act": Key("bn_sync: BatchNorm + ReLU, synchronised over GPUs", (str,)),
    "arch.args.backbone_pretrained": Key(
        "true: ImageNet weights from torchvision; a path: from that file; false: none", (bool, str)
    ),
    "arch.args.freeze_all_bn": Key("keep statistics and affine of every BatchNorm", (bool,)),
    "data_loader.type": Key("the data set's loader bundle", (str,)),
    "data_loader.args.data_dir": Key(
        "root of the data set; null: the environment (DKD_VOC_ROOT, DKD_ADE_ROOT), then the "
        "default (/dataset/VOC2012, /dataset/ADEChallengeData2016)",
        (str, NULL),
    ),
    "data_loader.args.class_names": Key(
        "names of a data set's own classes, background first", (list, NULL), items="names"
    ),
    "data_loader.args.task.name": Key("the schedule, such as 15-1", (str,), plain_name=True),
    "data_loader.args.task.step": Key("the step to train or evaluate", (int,), 0),
    "data_loader.args.task.setting": Key("overlap, disjoint or sequential", (str,)),
    "data_loader.args.task.idxs_path": Key("folder of image lists and of the class cache", (str,)),
    "data_loader.args.task.steps": Key(
        "own schedule: label ids of each step, [[1, 2], [3]]", (list, NULL), items="lists of ids"
    ),
    **_split("train"),
    "data_loader.args.val.cross_val": Key(
        "validate on a fifth held out from the step's training images", (bool,)
    ),
    **_split("val"),
    **_split("test"),
    "data_loader.args.num_workers": Key("loading processes per training process", (int,), 0),
    "data_loader.args.pin_memory": Key("pinned host memory (CUDA only)", (bool,)),
    "data_loader.args.memory.mem_size": Key("replayed old images; 0: no replay", (int,), 0),
    "optimizer.type": Key("the optimizer's class", (str,)),
    "optimizer.args.lr": Key(
        "learning rate of the backbone (10 times for the rest)", NUMBER, above=0
    ),
    "optimizer.args.weight_decay": Key("weight decay of what it applies to", NUMBER, 0),
    "optimizer.args.momentum": Key("momentum", NUMBER, 0, most=1),
    "optimizer.args.nesterov": Key("Nesterov momentum", (bool,)),
    "lr_scheduler.type": Key("the schedule's class", (str,)),
    "lr_scheduler.args.power": Key("exponent of the decay, default 0.9", NUMBER, above=0),
    "lr_scheduler.args.warmup_iters": Key(
        "WarmupPolyLR: share of the iterations that warm up", NUMBER, 0, most=1
    ),
    "evaluator.type": Key("the evaluator's class", (str,)),
    "metrics": Key("metrics to report, functions of utils/metric.py", (list,), items="names"),
    "trainer.epochs": Key("epochs of the step", (int,), 1),
    "trainer.save_dir": Key("folder of all runs", (str,)),
    "trainer.save_period": Key("epochs between kept checkpoints; -1: the last only", (int,), -1),
    "trainer.validation_period": Key("epochs between validations; -1: after the last", (int,), -1),
    "trainer.verbosity": Key("0: warnings, 1: progress, 2: also details", (int,), 0, most=2),
    "trainer.monitor": Key('"off", or "max NAME" / "min NAME" of a validation metric', (str,)),
    "trainer.early_stop": Key(
        "validations without a new best before stopping; -1: never", (int,), -1
    ),
    "trainer.reset_best_mnt": Key("forget the best value on resuming", (bool,)),
    "trainer.tensorboard": Key("write TensorBoard events", (bool,)),
}
HYPERPARAMETER = Key("weight or setting of the method", NUMBER, 0)
# Optional keyword arguments of the class in `type`: without them the class uses its own default.
OPTIONAL = {"lr_scheduler.args.power", "lr_scheduler.args.warmup_iters"}

SECTIONS = {key.rsplit(".", n)[0] for key in SCHEMA for n in range(1, key.count(".") + 1)} | {
    "hyperparameter",
    "evaluator.args",
    "lr_scheduler.args",
}


@dataclass(frozen=True)
class Flag:
    """A command-line flag and the config key that it overrides."""

    names: tuple[str, ...]
    key: str
    convert: Callable[[str], Any] | None  # None: a boolean switch
    eval_too: bool = False


FLAGS = (
    Flag(("--multiprocessing_distributed",), "multiprocessing_distributed", None, True),
    Flag(("--dist_url",), "dist_url", str, True),
    Flag(("--name",), "name", str, True),
    Flag(("--save_dir",), "trainer.save_dir", str, True),
    Flag(("--data_dir",), "data_loader.args.data_dir", str, True),
    Flag(("--method",), "method", str),
    Flag(("--mem_size",), "data_loader.args.memory.mem_size", int),
    Flag(("--seed",), "seed", int),
    Flag(("--ep", "--epochs"), "trainer.epochs", int),
    Flag(("--lr", "--learning_rate"), "optimizer.args.lr", float),
    Flag(("--bs", "--batch_size"), "data_loader.args.train.batch_size", int),
    Flag(("--task_name",), "data_loader.args.task.name", str),
    Flag(("--task_step",), "data_loader.args.task.step", int),
    Flag(("--task_setting",), "data_loader.args.task.setting", str),
    Flag(("--pos_weight",), "hyperparameter.pos_weight", float),
    Flag(("--mbce",), "hyperparameter.mbce", float),
    Flag(("--kd",), "hyperparameter.kd", float),
    Flag(("--dkd_pos",), "hyperparameter.dkd_pos", float),
    Flag(("--dkd_neg",), "hyperparameter.dkd_neg", float),
    Flag(("--ac",), "hyperparameter.ac", float),
    Flag(("--freeze_bn",), "arch.args.freeze_all_bn", None),
)


class _ArgumentParser(argparse.ArgumentParser):
    """argparse that reports in one sentence instead of a usage page."""

    def error(self, message: str) -> None:
        raise UserError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help.")


def _argument_parser(mode: str, description: str | None) -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="JSON config; default: the shipped one")
    if mode == "train":
        add("-r", "--resume", metavar="FILE", help="checkpoint to continue from")
        add("--test", action="store_true", help="evaluate the trained step, do not train")
    else:
        add("-r", "--resume", metavar="FILE", required=True, help="weights to evaluate")
        add("--test", action="store_true", help="accepted for old scripts: this always tests")
    add("-d", "--device", metavar="IDS", help="GPU ids, such as 0 or 0,1; cpu: no GPU")
    for flag in FLAGS:
        if mode == "eval" and not flag.eval_too:
            continue
        doc = f"{flag.key}: {_key(flag.key).doc}".replace("%", "%%")
        if flag.convert is None:
            add(*flag.names, dest=flag.key, help=doc, action=argparse.BooleanOptionalAction)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[flag.convert]
            add(*flag.names, dest=flag.key, help=doc, type=flag.convert, metavar=metavar)
    return parser


def _key(dotted: str) -> Key:
    return HYPERPARAMETER if dotted.startswith("hyperparameter.") else SCHEMA[dotted]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key '{key}' stands twice in one block; keep one of them.")
    return dict(pairs)


def read_json(path: Path) -> Any:
    """Parse the JSON file `path`.

    Raises:
        UserError: the file is missing, unreadable or broken (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}.") from None
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}."
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def flatten(tree: Any, source: str, *, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """A parsed JSON file as `{dotted key: value}`, each checked against `SCHEMA`.

    Args:
        tree: the parsed file.
        source: its name for messages.
        strict: an unknown key is an error; otherwise it is left out and told in the second result.

    Returns:
        The values and the unknown keys.

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
            if dotted in SECTIONS:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {dotted} must be a block {{…}}.")
                visit(value, dotted + ".")
            elif dotted in SCHEMA or prefix == "hyperparameter.":
                values[dotted] = check_value(dotted, value, source)
            elif strict:
                here = sorted(
                    {
                        key[len(prefix) :].split(".")[0]
                        for key in (*SCHEMA, *SECTIONS)
                        if key.startswith(prefix)
                    }
                )
                raise UserError(
                    f"{source}: unknown key '{dotted}'{did_you_mean(name, here)}; "
                    f"valid here: {listing(here) or 'nothing'}."
                )
            else:
                unknown.append(dotted)

    visit(tree, "")
    return values, unknown


def check_value(dotted: str, value: Any, source: str) -> Any:
    """Return `value` when the key `dotted` may hold it.

    Raises:
        UserError: naming the source, the key, the value and what is valid.
    """
    key = _key(dotted)
    if not key.accepts(value):
        shown = repr(value) if isinstance(value, float) else json.dumps(value)
        raise UserError(f"{source}: {dotted} is {shown}, but must be {key.expected()}.")
    if key.plain_name and not re.fullmatch(r"[\w.+-]+", value):
        raise UserError(
            f"{source}: {dotted} is '{value}', but it becomes a part of a folder name: "
            "use letters, digits, '_', '-', '+' and '.' only."
        )
    return value


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
    return tree


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return value


class ConfigParser:
    """The effective configuration of one run, read-only.

    `config["trainer"]["epochs"]` reads a key. What is no key of the file are attributes:

    Attributes:
        mode: "train" or "eval".
        resume: the checkpoint of `-r`, or None.
        device: the text of `-d`, or None.
        test: whether `--test` was given.
        notes: what the log should say about how the configuration came about.
    """

    def __init__(
        self,
        flat: Mapping[str, Any],
        *,
        mode: str = "train",
        resume: Path | None = None,
        device: str | None = None,
        test: bool = False,
        notes: Sequence[str] = (),
    ):
        self._tree = _nest(flat)
        self._view = _frozen(self._tree)
        self.mode, self.resume, self.device, self.test = mode, resume, device, test
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> Any:
        return self._view[name]

    def __getstate__(self) -> dict[str, Any]:
        # A mapping proxy cannot be pickled, and the processes of a distributed run get a copy.
        return {key: value for key, value in vars(self).items() if key != "_view"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._view = _frozen(self._tree)

    def as_dict(self) -> dict[str, Any]:
        """A private, writable copy, for `config.json`."""
        return json.loads(json.dumps(self._tree))

    @property
    def experiment(self) -> str:
        """`{setting}_{task}_{name}`, the folder that the steps of one run share."""
        task = self["data_loader"]["args"]["task"]
        return f"{task['setting']}_{task['name']}_{self['name']}"

    def step_dir(self, step: int | None = None) -> Path:
        """Folder of the checkpoints of `step` (default: this step)."""
        return self._folder("models", step)

    def log_dir(self, step: int | None = None) -> Path:
        """Folder of the log, the metrics and the TensorBoard events of `step`."""
        return self._folder("log", step)

    def _folder(self, kind: str, step: int | None) -> Path:
        step = self["data_loader"]["args"]["task"]["step"] if step is None else step
        return Path(self["trainer"]["save_dir"]) / kind / self.experiment / f"step_{step}"

    def resolve(self, section: str, registry: Mapping[str, type]) -> type:
        """The class that `section.type` names, after checking that it takes `section.args`.

        Raises:
            UserError: an unknown name, or an argument that this class does not have.
        """
        block = self[section]
        cls = registry[choose(f"{section}.type", block["type"], registry)]
        accepted = inspect.signature(cls).parameters
        for name in block["args"]:
            if name not in accepted:
                own = [
                    key.rsplit(".", 1)[1] for key in SCHEMA if key.startswith(f"{section}.args.")
                ]
                valid = [other for other in own if other in accepted]
                raise UserError(
                    f"{section}.args.{name} is no argument of {block['type']}; "
                    f"valid: {listing(valid) or 'none'}."
                )
        return cls

    def build(self, section: str, registry: Mapping[str, type], *args: Any, **kwargs: Any) -> Any:
        """An object of the class that `section.type` names, from `section.args` and the rest."""
        return self.resolve(section, registry)(*args, **self[section]["args"], **kwargs)

    @classmethod
    def from_args(
        cls,
        mode: str,
        default_config: str,
        description: str | None = None,
        argv: Sequence[str] | None = None,
    ) -> ConfigParser:
        """Parse the command line of an entry script.

        Args:
            mode: "train" or "eval".
            default_config: the shipped config of this script, relative to the project.
            description: text of `--help`.
            argv: the arguments; default: those of the process.

        Raises:
            UserError: whatever is wrong with a flag or a file, in one sentence.
        """
        args = vars(_argument_parser(mode, description).parse_args(argv))
        shipped = PROJECT_ROOT / default_config
        defaults, _ = flatten(read_json(shipped), str(shipped), strict=True)

        notes: list[str] = []
        resume = Path(args["resume"]) if args["resume"] else None
        if resume is not None and not resume.is_file():
            raise UserError(f"-r/--resume: there is no file {resume}.")
        values: dict[str, Any] = {}
        if args["config"]:
            path = Path(args["config"])
            values, _ = flatten(read_json(path), str(path), strict=True)
            notes.append(f"config: {path}")
        elif resume is not None and (beside := resume.parent / "config.json").is_file():
            values, unknown = flatten(read_json(beside), str(beside), strict=False)
            notes.append(f"config: {beside}, which lies beside the weights")
            if unknown:
                notes.append(f"ignored, for this version has no such keys: {listing(unknown)}")
            values.update(_own_folder(mode, resume, values, defaults))
        else:
            notes.append(f"config: {default_config}")

        bundle = values.get("data_loader.type", defaults["data_loader.type"])
        if bundle != defaults["data_loader.type"]:
            raise UserError(
                f"data_loader.type is '{bundle}', but this script is for "
                f"{defaults['data_loader.type']}; call the script of that data set."
            )
        for dotted in [key for key in OPTIONAL if key in defaults]:
            # Arguments of the default class mean nothing to another one.
            section = dotted.split(".")[0]
            default_type = defaults[f"{section}.type"]
            if values.get(f"{section}.type", default_type) != default_type:
                del defaults[dotted]

        flat = {**defaults, **values}
        for flag in FLAGS:
            if args.get(flag.key) is not None:
                flat[flag.key] = check_value(flag.key, args[flag.key], f"flag {flag.names[-1]}")
        return cls(
            flat,
            mode=mode,
            resume=resume,
            device=args["device"],
            test=args["test"] or mode == "eval",
            notes=notes,
        )


def _own_folder(
    mode: str, resume: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Where a run goes that takes its config from beside the weights `resume`.

    Such a file may be downloaded, so it does not get to choose a folder: training goes on in the
    folder tree that holds the checkpoint, and an evaluation writes below the default folder.
    """
    folder = resume.resolve().parent
    if mode == "train" and re.fullmatch(r"step_\d+", folder.name) and len(folder.parts) > 3:
        models = folder.parent.parent
        if models.name == "models":
            return {"trainer.save_dir": str(models.parent)}
    return {"trainer.save_dir": defaults["trainer.save_dir"]}
