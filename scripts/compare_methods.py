"""Train every method on one data set, each from the base step of its own family, with one seed.

    python scripts/compare_methods.py --out OUT --data_dir DATA --saliency_dir MAPS --seed 1

Trains what is left of the seed, below OUT/runs; `report.py` makes a page of it.

Networks are small and trained from scratch, so learning rates and epochs are those of this file,
by a method's family unless it is named here; all else is of the method's recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from base.base_method import BaseMethod
from trainer.entry import step_configs
from trainer.methods import METHODS, in_order
from trainer.run import run
from utils.config_file import read_config
from utils.errors import choose, one_sentence_errors
from utils.files import PROJECT_ROOT, write_json
from utils.parse_config import ConfigParser
from utils.recipe import BLOCKS, read_layers
from utils.text import path_argument


class Tuned(NamedTuple):
    """How a method trains here.

    Attributes:
        base: the method whose step 0 it starts from.
        first, later: learning rates of step 0 and of the later steps.
        settings: other ones than the recipe's, `KEY=VALUE`, at all steps.
        without_maps: further ones where there are no saliency maps.
    """

    base: str
    first: float
    later: float
    settings: tuple[str, ...] = ()
    without_maps: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A row of the table: a method, with replay of old images, or trained on all classes at once.

    Of joint training one network serves all schedules: they have the same classes.
    """

    method: str
    memory: bool = False
    joint: bool = False


# Learning rates of a family, at which small networks learn from scratch: step 0, later steps.
RATES = {"auxiliary": (0.01, 0.002), "background": (0.1, 0.05), "unknown": (0.01, 0.01)}
# As in the demo: at the published weight of 1 the new classes take more iterations than there are.
# Without the other, a few odd batches made step 1 diverge with one seed on one processor.
WEIGHTED = ("hyperparameter.pos_weight=2", "trainer.clip_grad_norm=10")
# Its authors' 0.0003 needs thousands of iterations.
MOVING = ("arch.args.backbone_bn_momentum=0.1",)
# What a method has otherwise than its family, trained from a step 0 of its own.
OWN: dict[str, dict[str, Any]] = {
    "finetune": {"base": "dkd", "settings": WEIGHTED},
    "dkd": {"settings": WEIGHTED},
    "lwf_mc": {"later": 0.01},
    "lwf": {"base": "ft"},
    "ilt": {"base": "ft", "later": 0.02},
    "mib": {"base": "ft"},
    "plop": {"base": "ft"},
    "sdr": {"later": 0.02, "settings": MOVING},
    "ssul": {"without_maps": ("hyperparameter.unknown=all",)},
}


def tuned(method: str) -> Tuned:
    """How a method of `METHODS` trains here."""
    first, later = RATES.get(METHODS[method].family, (0.01, 0.01))
    return Tuned(**{"base": method, "first": first, "later": later, **OWN.get(method, {})})


def make_entries() -> dict[str, Entry]:
    """Every possible row: NAME, NAME-m where the method can replay, joint-NAME."""
    rows = {}
    for name in in_order(METHODS):
        rows[name] = Entry(name)
        if METHODS[name].replay_confidence is not None:
            rows[f"{name}-m"] = Entry(name, memory=True)
        rows[f"joint-{name}"] = Entry(name, joint=True)
    return rows


ENTRIES = make_entries()
EXTRA = ("dkd-m", "ssul-m", "joint-dkd", "joint-ft")  # shown by default, beside all methods
SHOWN = [name for name in ENTRIES if name in METHODS or name in EXTRA]
FIRST = tuple(range(1, 16))
TASKS = {"15-5": (FIRST, tuple(range(16, 21))), "15-3-2": (FIRST, (16, 17, 18), (19, 20))}


def make_config(args: argparse.Namespace, steps: Sequence[Sequence[int]]) -> Path:
    """The configuration that all runs of a schedule share: that of `--config`, on this data."""
    read_layers(args.config)  # raises what is wrong with it
    tree = read_config(args.config)
    _drop_rates(tree)
    data = tree["data_loader"]["args"]
    data |= {"data_dir": str(args.data_dir), "num_workers": 0}
    data["task"] |= {"idxs_path": str(args.out / "lists"), "steps": [list(ids) for ids in steps]}
    path = args.out / f"config-{'-'.join(str(len(ids)) for ids in steps)}-s{args.seed}.json"
    write_json(path, tree)
    return path


def _drop_rates(tree: dict[str, Any]) -> None:
    """Leave out, also in blocks, what this file and the recipes say: rates and loss weights."""
    for block in ("hyperparameter", "optimizer"):
        tree.pop(block, None)
    for part in (*map(tree.get, BLOCKS), *tree.get("tasks", {}).values()):
        if part is not None:
            _drop_rates(part)


def train(args: argparse.Namespace) -> None:
    """Train what is left."""
    rows = [(name, task) for name in args.methods for task in args.task]
    for done, (name, task) in enumerate(rows, 1):
        train_row(args, name, task)
        text = f"seed {args.seed}: {name} on {task} ({done} of {len(rows)})"
        print(text, file=sys.__stdout__, flush=True)


def train_row(args: argparse.Namespace, name: str, task: str) -> None:
    """Train a row of the table on one schedule."""
    entry, label, first = ENTRIES[name], f"{name}-s{args.seed}", next(iter(args.task))
    last = len(args.task[task]) - 1
    own = tuned(entry.method)
    source = entry.method if entry.joint else own.base
    start = flags_of(source, tuned(source).first, args.base_epochs, args.saliency_dir)
    if entry.joint:
        if task == first:
            call(args, task, label, last, "--joint", *start)
        return
    base = f"base-{source}-s{args.seed}"
    call(args, first, base, 0, *start)
    taken = args.out / f"runs/models/overlap_{first}_{base}/step_0"
    call(args, task, label, 0, *start, "--base", taken)
    later = flags_of(entry.method, own.later, args.epochs, args.saliency_dir)
    memory = ["--mem_size", args.memory] if entry.memory else []
    call(args, task, label, f"1-{last}", *later, "--bs", args.batch, *memory)


def flags_of(method: str, lr: float, epochs: int, maps: Path | None) -> list[object]:
    """The flags of a method, its settings and, where it reads them, its saliency maps."""
    own = tuned(method)
    flags, settings = ["--method", method, "--lr", lr, "--epochs", epochs], own.settings
    # Whether it reads any may be a matter of its settings.
    if METHODS[method].reads_saliency is not BaseMethod.reads_saliency:
        if maps is None:
            settings = (*own.without_maps, *settings)
        else:
            flags += ["--saliency_dir", maps.resolve()]
    return [*flags, *(flag for setting in settings for flag in ("--set", setting))]


def call(args: argparse.Namespace, task: str, name: str, step: int | str, *flags: object) -> None:
    """Train steps of a run; what is finished is left alone."""
    config = make_config(args, args.task[task])
    line = ["-c", config, "-d", "cpu", "-r", "auto", "--seed", args.seed]
    line += ["--save_dir", args.out / "runs", "--task_name", task, "--name", name]
    line += ["--task_step", step, *flags]
    argv = [str(flag) for flag in line]
    run(*step_configs(ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)))


def _task(text: str) -> tuple[str, Any]:
    name, _, steps = text.partition("=")
    try:
        return name, json.loads(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no NAME=[[ids], …], such as 2-1=[[1,2],[3]]"
        ) from None


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=path_argument, required=True, help="folder of the runs")
    add("--seed", type=int, required=True, help="of all of them")
    add("--data_dir", type=path_argument, required=True, help="root of the data set, in VOC layout")
    add("--saliency_dir", type=path_argument, help="saliency maps for SSUL (default: none)")
    rows = "rows: NAME, NAME-m with a replay memory, joint-NAME"
    add("--methods", nargs="+", default=SHOWN, help=f"{rows} (default: {' '.join(SHOWN)})")
    add(
        "--config",
        type=path_argument,
        default=PROJECT_ROOT / "configs/demo.json",
        help="network and crops",
    )
    add("--task", type=_task, action="append", metavar="NAME=STEPS", help="schedules, label ids")
    add("--base_epochs", type=int, default=10, help="epochs of step 0 (%(default)s)")
    add("--epochs", type=int, default=10, help="epochs of later steps (%(default)s)")
    add("--batch", type=int, default=8, help="images of an iteration there (%(default)s)")
    add("--memory", type=int, default=60, help="exemplars where there is a memory (%(default)s)")
    args = parser.parse_args()
    args.out, args.task = args.out.resolve(), dict(args.task or TASKS)
    args.data_dir = args.data_dir.resolve()
    for name in args.methods:
        choose("an entry of --methods", name, ENTRIES)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / f"train-s{args.seed}.log"
    with (
        log.open("a", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        train(args)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
