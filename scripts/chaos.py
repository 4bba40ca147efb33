"""Break training runs on purpose and check that nothing is lost and nothing is different.

    python scripts/chaos.py [--trials 3] [--only KIND …] [--seed 0] [--dir DIR]

A small job (two steps of task 15-5 with replay memory, on synthetic data, on the CPU) is first run
undisturbed, with one process and with two. Then each kind of fault is tried several times at random
moments. After a fault the job is called again with `-r auto`; it must end with the bit-identical
weights and confusion matrices of the undisturbed run. A fault that the run itself can notice must
also end it with the right exit code and one clear sentence. Ends with a table and exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.disturbance.faults import KINDS
from scripts.disturbance.job import Broken, Job, require
from scripts.toy_data.tree import make_toy_voc
from utils.errors import UserError, one_sentence_errors
from utils.files import PART
from utils.text import path_argument


class Chaos:
    """Reference results and a place for the trials."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "toy"
        make_toy_voc(self.data, train=64, val=24, size=(96, 72), seed=3)
        self.expected: dict[int, list] = {}
        self.numbers = itertools.count()

    def job(self, processes: int) -> Job:
        """A fresh job."""
        folder = self.folder / f"job{next(self.numbers)}"
        folder.mkdir()
        return Job(folder, processes).prepare(self.data)

    def undisturbed(self, processes: int) -> list:
        """The result of a run that nothing happens to."""
        if processes not in self.expected:
            job = self.job(processes)
            job.finish()
            self.expected[processes] = job.result()
        return self.expected[processes]

    def trial(self, name: str, chance: random.Random) -> str:
        """One fault, the way on, and the comparison.

        Returns:
            What the fault led to, where its kind says so.

        Raises:
            Broken: what went wrong.
        """
        kind = KINDS[name]
        expected = self.undisturbed(kind.processes)
        job = self.job(kind.processes)
        kind.inject(job, chance)
        job.finish()
        job.compare(expected)
        parts = [path.name for step in job.steps for path in job.step_dir(step).glob(f".*{PART}")]
        require(not parts, f"half-written files were left: {parts}")
        shutil.rmtree(job.folder)
        return job.outcome


def main() -> int:
    """Parse the arguments, run the trials, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3, help="trials of each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument(
        "--dir", type=path_argument, help="where to work; default: a temporary folder"
    )
    args = parser.parse_args()
    if args.trials < 1:
        raise UserError("--trials must be at least 1.")
    if args.dir is not None and args.dir.exists():
        raise UserError(f"--dir {args.dir} exists already; name a folder that does not.")
    folder = Path(args.dir or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chaos, survived = Chaos(folder), dict.fromkeys(args.only, 0)
    for name in args.only:
        for number in range(args.trials):
            chance, start = random.Random(f"{args.seed} {name} {number}"), time.monotonic()
            try:
                outcome = chaos.trial(name, chance)
                survived[name] += 1
                outcome = (f"{outcome}, " if outcome else "") + "the same bits as undisturbed"
            except Broken as error:
                outcome = f"BROKEN: {error}"
            seconds = time.monotonic() - start
            print(f"{name} {number + 1}/{args.trials}: {outcome} ({seconds:.0f} s)", flush=True)
    print(f"\n{'fault':<42}{'tried':>6}{'survived':>10}")
    for name in args.only:
        print(f"{KINDS[name].title:<42}{args.trials:>6}{survived[name]:>10}")
    total = args.trials * len(args.only)
    good = sum(survived.values()) == total
    if good and args.dir is None:
        shutil.rmtree(folder)
    else:
        print(f"files: {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    with one_sentence_errors():
        sys.exit(main())
