"""The same weights under every convention by which papers of this field count.

    python scripts/protocol.py -r RUN/step_5/checkpoint-epoch60.pth [-d 0]

Most conventions follow from the confusion matrix of the test, which is read from where the training
or `eval_voc.py` wrote it, or made now. Two need a pass over images: the test images that hold no
class seen yet, and whole images instead of centre crops. What the passes counted is kept in
protocol.json beside that metrics.json: a second call makes none, and `scripts/report.py` shows it.
A file that is damaged is named and made anew.
"""

from __future__ import annotations

import argparse
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
import numpy as np

from base.task import Task
from scripts.predicting.student import Predictor, one_device
from scripts.reporting.reading import passes_json, read_result
from scripts.reporting.results import Result
from scripts.reporting.sections import label_of
from scripts.reporting.summary import convention_rows
from trainer.build import build_data
from trainer.evaluation import Evaluation
from trainer.results import METRICS, PASSES, WEIGHTS
from trainer.run import evaluation_dir
from utils.errors import UserError, one_sentence_errors
from utils.files import write_json
from utils.parse_config import ConfigParser
from utils.ranks import Ranks
from utils.run_folder import LOG, counterpart
from utils.text import path_argument

COLUMNS, SIGNS = ("old", "new", "hIoU", "all", "change"), (*[".2f"] * 4, "+.2f")


def find_test(predictor: Predictor) -> Result:
    """The test of some weights: the run's own, that of an evaluation, or one made now.

    A file that is damaged, or of other weights, is named and not used.
    """
    own = counterpart(predictor.weights.resolve().parent, LOG) / METRICS
    other = evaluation_dir(predictor.config, predictor.weights) / METRICS
    for file in (own, other):
        if not file.is_file():
            continue
        try:
            result = read_result(file)
        except UserError as error:
            print(f"not used: {error}", file=sys.stderr)
            continue
        if result.wide is None:  # an older file, which lacks what conventions need
            continue
        if not _fits(result, predictor.task):
            print(f"not used: {file} is of another step or other classes.", file=sys.stderr)
        elif result.content.get(WEIGHTS) == predictor.tested.sha256:
            for fault in result.damaged.values():
                print(f"not used: {fault}", file=sys.stderr)
            return result
    evaluation(predictor, predictor.config).test(other, predictor.tested)
    return read_result(other)


def _fits(result: Result, task: Task) -> bool:
    """Whether the matrices of a test are those of a task: of its data set, step and classes."""
    rows = 1 + len(task.classes)
    here = (task.dataset, task.schedule_step, task.schedule, task.background)
    there = (result.dataset, result.step, result.schedule, result.background)
    return here == there and result.wide is not None and len(result.wide) == rows


def evaluation(predictor: Predictor, config: ConfigParser) -> Evaluation:
    """What evaluates the weights under a configuration, on test images that are set up."""
    ranks = Ranks(0, 1, predictor.device)
    data = build_data(config, ranks)
    data.setup("test")
    return Evaluation(config, ranks, data=data, method=predictor.method, student=predictor.model)


def make_passes(predictor: Predictor, result: Result) -> dict[str, np.ndarray]:
    """The passes that the test itself does not make: name → wide confusion matrix."""
    usual = evaluation(predictor, predictor.config)
    assert result.wide is not None
    passes = {"all test images": result.wide}
    others = usual.data.other_test_loader()
    if len(others):
        passes["all test images"] = result.wide + usual.evaluate(others, "test")
    if usual.data.fixed_size("test"):
        test = "data_loader.args.test"
        whole = {f"{test}.args.transform": False, f"{test}.batch_size": 1}
        of_whole = evaluation(predictor, predictor.config.with_values(whole))
        passes["whole images"] = of_whole.evaluate(of_whole.data.test_loader, "test")
    return passes


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The card for a terminal; the published convention is marked."""
    width = max(len(row["convention"]) for row in rows)
    lines = [f"  {'mIoU in percent':<{width}}" + "".join(f"{name:>8}" for name in COLUMNS)]
    for row in rows:
        mark = "*" if row["published"] else " "
        cells = (
            f"{'-' if row[name] is None else format(row[name], sign):>8}"
            for name, sign in zip(COLUMNS, SIGNS, strict=True)
        )
        lines.append(f"{mark} {row['convention']:<{width}}" + "".join(cells))
    return "\n".join(lines)


def spread(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """By how much conventions alone move the figure of all classes."""
    known = [row for row in rows if row["all"] is not None]
    low, high = (choose(known, key=lambda row: row["all"]) for choose in (min, max))
    return (
        f"The same weights of {label} have an mIoU from {low['all']:.2f} ({low['convention']}) to "
        f"{high['all']:.2f} ({high['convention']}): conventions alone move it by "
        f"{high['all'] - low['all']:.1f} points."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and print the card of each weight file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-r", "--resume", nargs="+", required=True, type=path_argument, metavar="WEIGHTS")
    add("-d", "--device", metavar="ID", help="a GPU id, such as 0, or cpu")
    add("--data_dir", metavar="DIR", help="root of the data set, if not the config's")
    args = parser.parse_args(argv)
    device = one_device(args.device)
    for weights in args.resume:
        predictor = Predictor.of(weights, device, args.data_dir)
        result = find_test(predictor)
        if not result.passes:
            passes = make_passes(predictor, result)
            write_json(result.file.parent / PASSES, passes_json(result, passes))
            result = read_result(result.file)
        rows = convention_rows([result], result.schedule)
        print(f"{weights}: {result.dataset} {result.content['task']}, step {result.step}")
        print(table(rows))
        print("* as the published code of DKD counts")
        print(spread(label_of(result), rows), end="\n\n")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
