"""A report on runs, on one page: tables, curves, classes, pictures, and whether they compare.

    python scripts/report.py demo/runs --out demo/report
    python scripts/report.py runs/models/overlap_15-1_* --out report

A RUN is a run's folder (below models or log), a folder that holds runs, or a pattern of them;
steps, seeds and methods are found in it. Writes report.html (one file that opens anywhere),
report.json (every figure of it) and report.csv (a row per run), and prints the table of the last
step. Pictures need the weights and the test images; where these are missing, the page says so.
A run with a damaged file is named, on the page as well, and left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.processes import signals, threads

if __name__ == "__main__":
    signals.end_at_once()
    threads.spin_briefly()

# isort: split
from scripts.predicting.student import one_device
from scripts.reporting.figures import FIGURES
from scripts.reporting.page import write_page
from scripts.reporting.pictures import add_pictures
from scripts.reporting.runs import find_runs
from scripts.reporting.sections import make_sections
from scripts.reporting.summary import make_report
from utils.errors import UserError, one_sentence_errors
from utils.files import atomic_path, write_json
from utils.text import path_argument

SHOWN = ("old", "new", "hIoU", "all", "forgetting")  # in the terminal


def csv_of(report: Mapping[str, Any]) -> str:
    """A row per run and task, every figure in percent with all its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("dataset", "setting", "task", "method", "run", "seed", *FIGURES))
    for task in report["tasks"]:
        names = [task["dataset"], task["setting"], task["task"]]
        for method in task["methods"]:
            for run in method["runs"]:
                values = [run["summary"][key] for key in FIGURES]
                writer.writerow((*names, method["label"], run["name"], run["seed"], *values))
    return text.getvalue()


def table(task: Mapping[str, Any]) -> str:
    """The figures of a task's last step for a terminal, mean ± deviation over the seeds."""

    def cell(figure: Mapping[str, Any] | None) -> str:
        if figure is None:
            return "-"
        return f"{figure['mean']:.2f}" + (f" ± {figure['std']:.2f}" if figure["n"] > 1 else "")

    rows = [["percent, last step", *(FIGURES[key].name for key in SHOWN)]]
    for method in task["methods"]:
        seeds = len(method["runs"])
        label = method["label"] + (f", {seeds} seeds" if seeds > 1 else "")
        rows.append([label, *(cell(method["summary"][key]) for key in SHOWN)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, write the three files, print the table and where they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run or of runs, or a pattern")
    add("--out", type=path_argument, required=True, metavar="DIR", help="where the three files go")
    add("--pictures", type=int, default=6, metavar="N", help="test images shown (%(default)s)")
    add("-d", "--device", default=None, help="for the pictures: cpu or a GPU's id")
    add("--data_dir", metavar="DIR", help="root of the data set, if not the config's")
    args = parser.parse_args(argv)
    if args.pictures < 0:
        raise UserError("--pictures must be 0 or more.")
    runs, faults = find_runs(args.runs)
    sections, others = make_sections(runs)
    left_out = [*faults, *others]
    report = make_report(sections, left_out, args.runs)
    if args.pictures:
        device = one_device(args.device)
        for section, task in zip(sections, report["tasks"], strict=True):
            add_pictures(section, task, args.pictures, device, args.data_dir)
    write_json(args.out / "report.json", report)
    with atomic_path(args.out / "report.csv") as temporary:
        temporary.write_text(csv_of(report), encoding="utf-8", errors="backslashreplace")
    write_page(report, args.out / "report.html")
    for task in report["tasks"]:
        print(f"{task['dataset']} {task['task']}, {task['setting']}, step {task['last']}")
        print(table(task), end="\n\n")
    for sentence in left_out:
        print(sentence)
    print(f"report: {(args.out / 'report.html').resolve()}")


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders need not be UTF-8
    with one_sentence_errors():
        main()
