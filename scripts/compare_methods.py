"""Train every method on one data set, each from the base step of its own family, with one seed.

    python scripts/compare_methods.py --out OUT --data_dir DATA --saliency_dir MAPS --seed 1

Trains what is left of the seed, below OUT/runs, of which `report.py` tells then. Called by
`compare_methods.sh`; `--config` and `--task` name other data and schedules.

Networks are small and trained from scratch, so learning rates and epochs are those of this file;
the weights of the loss terms and whatever else a method asks for are its recipe's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer.run import run
from trainer.steps import step_configs
from utils.config_file import read_json
from utils.misc import PROJECT_ROOT, choose, one_sentence_errors, write_json
from utils.parse_config import ConfigParser
from utils.recipe import BLOCKS, read_layers
from utils.text import path_argument


@dataclass(frozen=True)
class Base:
    """A step 0 that methods of one family start from, with what differs from the recipe's."""

    method: str
    lr: float
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        method: its name.
        base: whose step 0 it starts from, a key of `BASES`; of joint training, its learning rate.
        lr: of the later steps.
        memory: whether it replays old images.
        joint: all classes at once; one network serves all schedules, their first steps being equal.
        settings: that differ from the recipe's, `KEY=VALUE`.
    """

    method: str
    base: str
    lr: float = 0.0
    memory: bool = False
    joint: bool = False
    settings: tuple[str, ...] = ()


# As in the demo: at the published weight of 1 the new classes take more iterations than there are.
WEIGHTED = ("hyperparameter.pos_weight=2",)
# Its authors' 0.0003 needs thousands of iterations.
MOVING = ("arch.args.backbone_bn_momentum=0.1",)
BASES = {
    "dkd": Base("dkd", 0.01),
    "ft": Base("ft", 0.1),
    "lwf_mc": Base("lwf_mc", 0.02),
    "sdr": Base("sdr", 0.1, MOVING),
    "ssul": Base("ssul", 0.01),
}
ENTRIES = {
    "finetune": Entry("finetune", "dkd", 0.002, settings=WEIGHTED),
    "dkd": Entry("dkd", "dkd", 0.002, settings=WEIGHTED),
    "dkd-m": Entry("dkd", "dkd", 0.002, memory=True, settings=WEIGHTED),
    "joint-dkd": Entry("dkd", "dkd", joint=True),
    "ft": Entry("ft", "ft", 0.05),
    "lwf_mc": Entry("lwf_mc", "lwf_mc", 0.01),
    "lwf": Entry("lwf", "ft", 0.05),
    "ilt": Entry("ilt", "ft", 0.02),
    "mib": Entry("mib", "ft", 0.05),
    "plop": Entry("plop", "ft", 0.05),
    "sdr": Entry("sdr", "sdr", 0.02, settings=MOVING),
    "joint-ft": Entry("ft", "ft", joint=True),
    "ssul": Entry("ssul", "ssul", 0.01),
    "ssul-m": Entry("ssul", "ssul", 0.01, memory=True),
}
FIRST = tuple(range(1, 16))
TASKS = {"15-5": (FIRST, tuple(range(16, 21))), "15-3-2": (FIRST, (16, 17, 18), (19, 20))}


def make_config(args: argparse.Namespace, steps: Sequence[Sequence[int]]) -> Path:
    """The configuration that all runs of a schedule share: that of `--config`, on this data."""
    read_layers(args.config)  # tells what is wrong with it
    tree = read_json(args.config)
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
    seed, out, tasks = args.seed, args.out, args.task
    runs, done = out / "runs", 0
    total = len(args.methods) * len(tasks)

    def call(task: str, name: str, step: str, *flags: object) -> None:
        words = ["-c", make_config(args, tasks[task]), "-d", "cpu", "-r", "auto", "--seed", seed]
        words += ["--save_dir", runs, "--task_name", task, "--name", name, "--task_step", step]
        words = [str(word) for word in (*words, *flags)]
        config = ConfigParser.from_args("train", "configs/config_voc.json", argv=words)
        run(*step_configs(config))

    def maps(method: str) -> list[object]:
        if method != "ssul":
            return []
        if args.saliency_dir is None:
            return ["--set", "hyperparameter.unknown=all"]
        return ["--saliency_dir", args.saliency_dir.resolve()]

    def typed(settings: Sequence[str]) -> list[str]:
        return [word for value in settings for word in ("--set", value)]

    def base(name: str) -> list[object]:
        of = BASES[name]
        flags = ["--method", of.method, "--lr", of.lr, "--epochs", args.base_epochs]
        return [*flags, *maps(of.method), *typed(of.settings)]

    first = next(iter(tasks))
    for name in args.methods:
        entry = ENTRIES[name]
        label, start = f"{name}-s{seed}", base(entry.base)
        for task, schedule in tasks.items():
            if entry.joint:
                if task == first:
                    call(task, label, str(len(schedule) - 1), "--joint", *start)
            else:
                call(first, f"base-{entry.base}-s{seed}", "0", *start)
                taken = runs / f"models/overlap_{first}_base-{entry.base}-s{seed}/step_0"
                call(task, label, "0", *start, "--base", taken)
                later = ["--method", entry.method, "--lr", entry.lr, "--bs", args.batch]
                later += ["--epochs", args.epochs]
                memory = ["--mem_size", args.memory] if entry.memory else []
                later += [*maps(entry.method), *memory, *typed(entry.settings)]
                call(task, label, f"1-{len(schedule) - 1}", *later)
            done += 1
            print(
                f"seed {seed}: {name} on {task} ({done} of {total})",
                file=sys.__stdout__,
                flush=True,
            )


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
    add("--methods", nargs="+", default=list(ENTRIES), help="rows (default: all)")
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
