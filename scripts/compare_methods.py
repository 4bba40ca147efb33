"""Train every method on one data set, each from the base step of its own family, and tabulate them.

    python scripts/compare_methods.py --out OUT --data_dir DATA --saliency_dir MAPS --train 1
    python scripts/compare_methods.py --out OUT

The first trains what is left of one seed, below OUT/runs; the second prints the table of all seeds
that are there and writes it to OUT/table.md, and OUT/comparison.png. Called by
`compare_methods.sh`; `--config` and `--task` name other data and schedules.

Networks are small and trained from scratch, so learning rates and epochs are those of this file;
the weights of the loss terms and whatever else a method asks for are its recipe's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer.run import run
from trainer.steps import METRICS, unfinished
from utils.config_file import read_json
from utils.cost import FILE as COST
from utils.misc import PROJECT_ROOT, UserError, choose, one_sentence_errors, write_json
from utils.parse_config import ConfigParser

METRIC = "Mean_Intersection_over_Union"
COLUMNS = {"old": "old", "new": "new", "harmonic": "hIoU", "overall": "all"}


@dataclass(frozen=True)
class Base:
    """A step 0 that methods of one family start from."""

    method: str
    lr: float


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
BASES = {
    "dkd": Base("dkd", 0.01),
    "ft": Base("ft", 0.1),
    "lwf_mc": Base("lwf_mc", 0.02),
    "sdr": Base("sdr", 0.1),
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
    "sdr": Entry("sdr", "sdr", 0.02),
    "joint-ft": Entry("ft", "ft", joint=True),
    "ssul": Entry("ssul", "ssul", 0.01),
    "ssul-m": Entry("ssul", "ssul", 0.01, memory=True),
}
FIRST = tuple(range(1, 16))
TASKS = {"15-5": (FIRST, tuple(range(16, 21))), "15-3-2": (FIRST, (16, 17, 18), (19, 20))}


def make_config(args: argparse.Namespace, steps: Sequence[Sequence[int]]) -> Path:
    """The configuration that all runs of a schedule share: that of `--config`, on this data."""
    tree = read_json(args.config)
    for block in ("hyperparameter", "optimizer"):
        tree.pop(block, None)
    data = tree["data_loader"]["args"]
    data |= {"data_dir": str(args.data_dir), "num_workers": 0}
    data["task"] |= {"idxs_path": str(args.out / "lists"), "steps": [list(ids) for ids in steps]}
    path = args.out / f"config-{'-'.join(str(len(ids)) for ids in steps)}-s{args.train}.json"
    write_json(path, tree)
    return path


def train(args: argparse.Namespace) -> None:
    """Train what is left of the seed `args.train`."""
    seed, out, tasks = args.train, args.out, args.task
    runs, done = out / "runs", 0
    total = len(args.methods) * len(tasks)

    def call(task: str, name: str, step: str, *flags: object) -> None:
        words = ["-c", make_config(args, tasks[task]), "-d", "cpu", "-r", "auto", "--seed", seed]
        words += ["--save_dir", runs, "--task_name", task, "--name", name, "--task_step", step]
        words = [str(word) for word in (*words, *flags)]
        config = ConfigParser.from_args("train", "configs/config_voc.json", argv=words)
        if steps := unfinished(config):
            run(*steps)

    def maps(method: str) -> list[object]:
        if method != "ssul":
            return []
        if args.saliency_dir is None:
            return ["--set", "hyperparameter.unknown=all"]
        return ["--saliency_dir", args.saliency_dir.resolve()]

    def base(name: str) -> list[object]:
        of = BASES[name]
        flags = ["--method", of.method, "--lr", of.lr, "--epochs", args.base_epochs]
        return [*flags, *maps(of.method)]

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
                later += [word for value in entry.settings for word in ("--set", value)]
                call(task, label, f"1-{len(schedule) - 1}", *later, *maps(entry.method), *memory)
            done += 1
            print(
                f"seed {seed}: {name} on {task} ({done} of {total})",
                file=sys.__stdout__,
                flush=True,
            )


def results(runs: Path) -> dict[str, dict[str, list[tuple[Path, dict[str, Any]]]]]:
    """Task → row → (folder of the last step's log, its metrics), one for each seed."""
    found: dict[str, dict[str, list[tuple[Path, dict[str, Any]]]]] = {}
    joint: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in sorted((runs / "log").glob(f"overlap_*/step_*/{METRICS}")):
        metrics = json.loads(file.read_text())
        config = read_json(runs / "models" / file.parent.relative_to(runs / "log") / "config.json")
        schedule = config["data_loader"]["args"]["task"]["steps"]
        row = metrics["name"].rpartition("-s")[0]
        if row in ENTRIES and metrics["step"] == len(schedule) - 1:
            rows = joint if metrics["joint"] else found.setdefault(metrics["task"], {})
            rows.setdefault(row, []).append((file.parent, metrics))
    if not found and not joint:
        raise UserError(f"{runs} holds no finished run; train some with --train SEED first.")
    return {task: rows | joint for task, rows in found.items()} or {"joint": joint}


def mean_and_deviation(values: Sequence[float]) -> str:
    """`87.18 ± 0.40`, the sample's deviation; without it where there is one value."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def table(rows: dict[str, list[tuple[Path, dict[str, Any]]]]) -> list[str]:
    """A table in Markdown, a row for each method, in the order of `ENTRIES`."""
    lines = [
        f"| method | seeds | {' | '.join(COLUMNS.values())} | s per epoch | peak MiB |",
        f"|---|{'---:|' * (len(COLUMNS) + 3)}",
    ]
    for name in (name for name in ENTRIES if name in rows):
        found = rows[name]
        groups = [[metrics["metrics"][METRIC][group] for _, metrics in found] for group in COLUMNS]
        cells = [name, str(len(found)), *map(mean_and_deviation, groups)]
        costs = [json.loads(file.read_text()) for folder, _ in found for file in folder.glob(COST)]
        for key, digits in (("seconds_per_epoch", 1), ("peak_memory_mib", 0)):
            values = [cost[key] for cost in costs if cost[key] is not None]
            cells.append(f"{statistics.mean(values):.{digits}f}" if values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(out: Path) -> None:
    """Print and write the tables, and draw the last steps of the first seed."""
    found = results(out / "runs")
    text = []
    for task, rows in found.items():
        text += [f"mIoU in percent after the last step, {task}:", "", *table(rows), ""]
    print("\n".join(text))
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")
    task = max(found, key=lambda task: len(task.split("-")))
    logs = [found[task][name][0][0] for name in ENTRIES if name in found[task]]
    folders = [str(out / "runs/models" / Path(*folder.parts[-2:])) for folder in logs]
    script = [sys.executable, "scripts/compare.py", "--out", str(out / "comparison.png")]
    subprocess.run([*script, "--side", "96", *folders], check=True, stdout=subprocess.DEVNULL)
    print(f"picture: {(out / 'comparison.png').resolve()}")


def _task(text: str) -> tuple[str, Any]:
    name, _, steps = text.partition("=")
    try:
        return name, json.loads(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no NAME=[[ids], …], such as 2-1=[[1,2],[3]]"
        ) from None


def main() -> None:
    """Train a seed, or tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of runs, table and picture")
    add("--train", type=int, metavar="SEED", help="train what is left of this seed")
    add("--methods", nargs="+", default=list(ENTRIES), help="rows (default: all)")
    add("--config", type=Path, default=PROJECT_ROOT / "configs/demo.json", help="network and crops")
    add("--data_dir", type=Path, help="root of the data set, in VOC layout")
    add("--saliency_dir", type=Path, help="saliency maps for SSUL (default: none)")
    add("--task", type=_task, action="append", metavar="NAME=STEPS", help="schedules, label ids")
    add("--base_epochs", type=int, default=10, help="epochs of step 0 (%(default)s)")
    add("--epochs", type=int, default=10, help="epochs of later steps (%(default)s)")
    add("--batch", type=int, default=8, help="images of an iteration there (%(default)s)")
    add("--memory", type=int, default=60, help="exemplars where there is a memory (%(default)s)")
    args = parser.parse_args()
    args.out, args.task = args.out.resolve(), dict(args.task or TASKS)
    for name in args.methods:
        choose("an entry of --methods", name, ENTRIES)
    if args.train is None:
        report(args.out)
        return
    if args.data_dir is None:
        raise UserError("--train needs --data_dir, the root of a data set in VOC layout.")
    args.data_dir = args.data_dir.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / f"train-s{args.train}.log"
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        train(args)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
