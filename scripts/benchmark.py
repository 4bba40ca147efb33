"""How fast is this project, and how far from what the machine allows?

    python scripts/benchmark.py [data|loss|step|eval|scan|growth|all] [--device cpu|cuda|cuda:1]
                                [--json FILE] [--quick] [--cpu_time]

Each section measures this project in turn with a *plain* implementation of the same formulas and
with a *limit*: the part of the work that nobody can leave out. Before a time counts, both must give
the same numbers. The plain way is how codes of this field go about it: labels masked by a Python
lambda per pixel, images made float and normalised one by one on the CPU, losses and their targets
at full resolution (the definitions in `models/loss.py`), every term fetched with `.item()`,
evaluation image by image with NumPy.

It needs no data: images and masks of VOC's size are drawn into a temporary folder. `--quick`
only shows that all works; its tiny network says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.processes import threads

threads.spin_briefly()  # as in a run
os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar would be measured as well

# isort: split
import torch
import torchvision

from scripts.benchmarking.data import measure_data, measure_scan
from scripts.benchmarking.evaluation import measure_eval
from scripts.benchmarking.growth import measure_growth
from scripts.benchmarking.loss import measure_loss
from scripts.benchmarking.measure import Row, say, table
from scripts.benchmarking.plan import Plan, make_plan
from scripts.benchmarking.step import measure_step
from utils.errors import UserError, choose, one_sentence_errors
from utils.files import write_json
from utils.machine import cores
from utils.text import path_argument

BUSY = 0.5  # processes that want a core before anything is measured


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8", "replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    cuda = device.type == "cuda"
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


SECTIONS: dict[str, Callable[[Plan], list[Row]]] = {
    "data": measure_data,
    "loss": measure_loss,
    "step": measure_step,
    "eval": measure_eval,
    "scan": measure_scan,
    "growth": measure_growth,
}


def find_device(text: str) -> torch.device:
    """The device of `--device`."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--device is '{text}'; valid: cpu, cuda, cuda:1, ….")
    device = torch.device(text)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is '{text}', but there are {torch.cuda.device_count()} GPUs.")
    return device


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="?", default="all", help="what to measure; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="also write all figures there"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the seconds of all cores together, which other work hardly moves "
        "(not in scan, whose processes are many)",
    )
    args = parser.parse_args(argv)
    choose("the section", args.section, [*SECTIONS, "all"])
    device = find_device(args.device)
    if args.cpu_time and device.type != "cpu":
        raise UserError("--cpu_time is for --device cpu; a GPU's seconds are those of the clock.")
    plan, rows, about = make_plan(device, args.quick), [], machine(device)
    if args.cpu_time:
        plan, about = replace(plan, clock=time.process_time), {**about, "seconds": "CPU"}
    for name in SECTIONS if args.section == "all" else [args.section]:
        say(name)
        rows += SECTIONS[name](plan)
        if args.json:  # after every section, for a later one may fail
            figures = [row.as_dict() for row in rows]
            write_json(args.json, {"machine": about, "quick": args.quick, "rows": figures})
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if about["load"] > BUSY:
        print(
            f"load {about['load']:.1f} before the start: others disturb the clock, see --cpu_time"
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    with one_sentence_errors():
        main()
