"""What a refactor must not change: runs on small synthetic data, as one JSON file to compare.

    python scripts/oracle.py --out before.json
    python scripts/oracle.py --against before.json

Trains two steps with DKD-M, fine-tuning, MiB, PLOP and SSUL-M, DKD-M also in two processes and
stopped by a signal on the way; evaluates, predicts, reports; gives every wrong input of
`tests/test_wrong_input.py`. What it keeps: hashes of weights, optimizer state and whatever else a
checkpoint holds, of memory lists and pictures; metrics and figures without times; the names of all
files; exit codes and sentences. Only answers of one machine with one torch compare. It takes some
minutes on two cores and what the tests need (`tests/requirements.txt`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from tqdm import tqdm

from scripts.toy_data.tree import make_toy_voc
from tests.helpers import write_config
from tests.test_wrong_input import CASES, Case, write_good_config
from utils.errors import UserError, one_sentence_errors
from utils.files import PROJECT_ROOT, write_json
from utils.machine import cores
from utils.text import path_argument

RUNS = {  # name → flags
    "DKD-M": "--mem_size 6",
    "finetune": "--method finetune",
    "MiB": "--method mib",
    "PLOP": "--method plop --set data_loader.args.train.args.transform_args.crop_size=64",
    "SSUL-M": "--method ssul --mem_size 6 --set hyperparameter.unknown=all",
    "two_processes": "--mem_size 6 --multiprocessing_distributed --set n_gpu=2 --bs 2",
    "stopped": "--mem_size 6 --save_dir stopped",
}
TRAIN = "train_voc.py -c config.json -d cpu -r auto --task_step all --epochs 2 --bs 4 --seed 5"
# Of the same run another value each time: sources, moments, generators that nothing draws from.
VOLATILE = {
    *("code", "own_code", "seconds", "images_per_s", "created", "peak_memory_mib", "whole"),
    *("numpy", "python", "seconds_per_epoch", "minutes", "cost"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="write the answer here")
    parser.add_argument("--against", type=path_argument, metavar="FILE", help="an earlier answer")
    options = parser.parse_args()
    if options.out is None and options.against is None:
        raise UserError("give --out FILE, --against FILE or both.")
    earlier = None if options.against is None else json.loads(options.against.read_bytes())
    with tempfile.TemporaryDirectory(prefix="oracle_") as folder:
        answer = ask(Path(folder).resolve())
    if options.out is not None:
        write_json(options.out, answer)
    if earlier is not None:
        faults = differences(earlier, answer)
        print("\n".join(faults) or "equal")
        sys.exit(bool(faults))


def ask(root: Path) -> dict[str, Any]:
    """The answer of this project, worked out in the folder `root`."""
    make_toy_voc(root / "data", train=48, val=24, size=(64, 48), seed=3)
    write_config(root / "config.json", root / "data")
    answer = {"wrong input": wrong_inputs(root)}
    with ThreadPoolExecutor(cores()) as pool:
        jobs = {name: pool.submit(train, root, name) for name in RUNS}
        bar = tqdm(jobs.items(), "runs", leave=False)
        answer["runs"] = {name: job.result() for name, job in bar}
    weights = root / "runs/models/overlap_15-5_DKD-M/step_1/checkpoint-epoch2.pth"
    image = min((root / "data/JPEGImages").iterdir())
    answer["scripts"] = {
        "evaluation": call(root, f"eval_voc.py -d cpu -r {weights} --save_dir evaluated"),
        "prediction": call(root, f"scripts/predict.py -d cpu -r {weights} {image} --out predicted"),
        "report": call(root, "scripts/report.py runs -d cpu --out report"),
    }
    answer["files"] = {
        place(path, root): content(path, root)
        for folder in ("runs", "stopped", "evaluated", "predicted", "report")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
    return answer


def train(root: Path, name: str) -> list[Any]:
    """Exit codes and errors of the calls of a run."""
    command = f"{TRAIN} {RUNS[name]} --name {name}"
    if name != "stopped":
        return [call(root, command)]
    first = root / "stopped/models/overlap_15-5_stopped/step_0/last.pth"
    return [call(root, command, stop_at=first), call(root, command)]


def call(root: Path, command: str, stop_at: Path | None = None) -> list[Any]:
    """Exit code and standard error of a script; `stop_at` is the file that brings the signal."""
    script, *flags = shlex.split(command)
    with subprocess.Popen(
        [sys.executable, str(PROJECT_ROOT / script), *flags],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while stop_at is not None and process.poll() is None and not stop_at.exists():
            time.sleep(0.005)
        if stop_at is not None:
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    sentences = [line for line in errors.splitlines() if ": error: " in line]
    return [process.returncode, *(place(line, root) for line in sentences)]


def wrong_inputs(root: Path) -> dict[str, Any]:
    """Name of a wrong input → exit code, output, files that it leaves."""
    torch.set_num_threads(1)  # other threads would not be there in a forked process
    answers = {}
    for number, (name, case) in enumerate(tqdm(CASES.items(), "wrong input", leave=False)):
        folder = root / "wrong" / str(number)
        folder.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            _give(case, folder, root / "data")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = (folder / "said").read_text(encoding="utf-8")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        answers[name] = [code, place(said, folder, root), files]
    return answers


def _give(case: Case, folder: Path, data: Path) -> None:
    """In a process of its own: what the entry script does with a wrong input; does not return."""
    code = 1
    try:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ["DKD_VOC_ROOT"] = "no_such_root"
        write_good_config(data)
        case.lay_out(pytest.MonkeyPatch())
        script = f"{case.mode}_voc.py"
        sys.argv = [script, "-c", "config.json", *shlex.split(case.flags)]
        runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def content(path: Path, root: Path) -> Any:
    """What a file of a run holds, as far as it is the same each time."""
    if path.name == "history.json" and root / "stopped" in path.parents:
        return None  # an epoch's mean is of what came after the signal
    if path.suffix == ".pth":
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: digest(value) for key, value in stable(checkpoint, root).items()}
    if path.suffix == ".json":
        return stable(json.loads(path.read_bytes()), root)
    if path.suffix in (".png", ".npy", ".npz"):
        return digest(path.read_bytes())
    return None  # logs, pages: their name alone


def stable(value: Any, root: Path) -> Any:
    """A tree of values without times and sources, and wherever it was made."""
    if isinstance(value, dict):
        return {str(key): stable(value[key], root) for key in value if key not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [stable(item, root) for item in value]
    if isinstance(value, (str, Path)):
        return place(value, root)
    return value


def digest(value: Any) -> str:
    """A short hash of tensors and plain values in any nesting."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        else:
            found.update(value if isinstance(value, bytes) else repr(value).encode())

    add(value)
    return found.hexdigest()[:16]


def place(text: str | Path, *roots: Path) -> str:
    """A text without what is another each time: folders, moments, the hash of a whole file."""
    text = str(text)
    for root in roots:
        text = text.replace(str(root), "ROOT")
    text = text.replace(str(PROJECT_ROOT), "PROJECT")
    return re.sub(r"(events\.out\.tfevents)\.[\w.-]+|(-epoch\d+)-[0-9a-f]{12}", r"\1\2", text)


def differences(earlier: Any, answer: Any, where: str = "") -> list[str]:
    """A line for each value that is not as it was."""
    if isinstance(earlier, list) and isinstance(answer, list) and len(earlier) == len(answer):
        earlier, answer = dict(enumerate(earlier)), dict(enumerate(answer))
    if not (isinstance(earlier, dict) and isinstance(answer, dict)):
        return [] if earlier == answer else [f"{where}: {earlier} → {answer}"]
    lines = []
    for key in {**earlier, **answer}:
        before, now = (each.get(key, "nothing") for each in (earlier, answer))
        lines += differences(before, now, f"{where} / {key}")
    return lines


if __name__ == "__main__":
    with one_sentence_errors():
        main()
