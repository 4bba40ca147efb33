"""Runs that are stopped, damaged, continued, shared, accumulated: nothing lost or different."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from base.base_model import HeadPlan
from models.model import DeepLabV3
from scripts.chaos import Chaos
from scripts.disturbance.job import Job
from tests.helpers import PROJECT, after, send, train, write_config
from trainer import replay
from trainer.evaluation import Evaluation
from trainer.plan import plan_run
from trainer.provenance import code_hash, differences, remarks
from trainer.trainer import Trainer
from utils import checkpoint as files
from utils.config_schema import SCHEMA
from utils.errors import UserError, one_sentence_errors
from utils.logger import close_logger, log, setup_logger
from utils.parse_config import ConfigParser
from utils.processes import children, signals
from utils.processes.signals import EXIT_INTERRUPTED, Interrupted

STEP_1 = ("--task_step", "1", "--freeze_bn", "--mem_size", "6", "--bs", "4")
FLAGS = {0: ("--epochs", "3"), 1: ("--epochs", "3", *STEP_1)}


def metrics(parsed):
    return json.loads((parsed.log_dir() / "metrics.json").read_text())


def assert_same(run, expected, epoch=3):
    """The bits of the final weights, and the confusion matrix."""
    a, b = (
        files.load(one.step_dir() / files.epoch_file(epoch))["state_dict"]
        for one in (run, expected)
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(run)["confusion"] == metrics(expected)["confusion"]


def epochs(run):
    """What the history tells of each."""
    return json.loads((run.log_dir() / "history.json").read_text())["epochs"]


def losses(run):
    return [(each["epoch"], each["losses"]) for each in epochs(run)]


@pytest.fixture(scope="module")
def undisturbed(toy_root, tmp_path_factory):
    """A config and its two steps, run without any fault; dropout is on at step 0."""
    config = write_config(tmp_path_factory.mktemp("undisturbed") / "toy.json", toy_root)
    return config, [train(config, *FLAGS[step]) for step in (0, 1)]


@pytest.fixture
def attempt(undisturbed, tmp_path):
    """A function that calls a step in a fresh folder, where step 0 is done already for step 1."""
    config, (zero, _) = undisturbed

    def call(step, *flags):
        saved = tmp_path / "runs"
        models = saved / "models" / zero.run_folder.name
        if step and not models.exists():
            models.mkdir(parents=True)
            (models / "step_0").symlink_to(zero.step_dir().resolve())
        return train(config, *FLAGS[step], "--save_dir", str(saved), "-r", "auto", *flags)

    call.folder = lambda step: tmp_path / "runs/models" / zero.run_folder.name / f"step_{step}"
    call.log = lambda step: tmp_path / "runs/log" / zero.run_folder.name / f"step_{step}"
    return call


# ------------------------------------------------------------------------------- stop and continue
def iterations(run):
    """Per epoch, of a run of three epochs."""
    return files.load(run.step_dir() / "last.pth")["lr_scheduler"]["last_epoch"] // 3


@pytest.mark.parametrize(("step", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
@pytest.mark.parametrize("where", ["first iteration", "inside an epoch", "end of an epoch"])
def test_stopped_while_it_trains(undisturbed, attempt, monkeypatch, step, where, number):
    _, runs = undisturbed
    each = iterations(runs[step])
    at = {"first iteration": 1, "inside an epoch": each + 2, "end of an epoch": each}[where]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", after(at, Trainer.train_step, send(number)))
        with pytest.raises(Interrupted, match=r"stopped by SIG.*: continue with -r auto"):
            attempt(step)
    saved = files.load(attempt.folder(step) / "last.pth")
    assert (saved["epoch"], saved["iteration"]) == divmod(at, each)
    assert not saved["finished"]
    run = attempt(step)
    assert_same(run, runs[step])
    assert [each["epoch"] for each in epochs(run)] == [1, 2, 3]
    whole = [each["whole"] for each in epochs(run)]
    cut = at // each if at % each else None  # the epoch that was stopped inside
    assert whole == [number != cut for number in range(3)]
    same = [number for number in range(3) if number != cut]
    assert [losses(run)[n] for n in same] == [losses(runs[step])[n] for n in same]


def test_stopped_while_it_validates(undisturbed, attempt, monkeypatch):
    """The epoch is trained, so only its validation is done again."""
    each = iterations(undisturbed[1][0])
    original = Evaluation.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(
            Evaluation, "evaluate", lambda *args: (send(signal.SIGINT)(), original(*args))[1]
        )
        with pytest.raises(Interrupted):
            attempt(0)
    saved = files.load(attempt.folder(0) / "last.pth")
    assert (saved["epoch"], saved["iteration"]) == (2, each)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", None)  # is not to be called
        run = attempt(0)
    assert_same(run, undisturbed[1][0])
    assert losses(run) == losses(undisturbed[1][0]), "the epoch is told once, and not lost"


@pytest.mark.slow
def test_stopped_while_it_validates_between_epochs(undisturbed, attempt, monkeypatch):
    """The epochs after it are told as well."""
    validated = ("--set", "trainer.validation_period=1")
    original = Evaluation.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(
            Evaluation, "evaluate", lambda *args: (send(signal.SIGINT)(), original(*args))[1]
        )
        with pytest.raises(Interrupted, match="Epoch 0 is done and iteration"):
            attempt(0, *validated)
    run = attempt(0, *validated)
    assert_same(run, undisturbed[1][0])
    assert losses(run) == losses(undisturbed[1][0])


def test_stopped_in_its_final_test(undisturbed, attempt, monkeypatch):
    with monkeypatch.context() as patch:
        original = Trainer.test
        patch.setattr(Trainer, "test", lambda *args: (send(signal.SIGTERM)(), original(*args)))
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            attempt(0)
    assert files.load(attempt.folder(0) / "last.pth")["finished"]
    run = attempt(0)
    assert "the step is trained, its test is left" in (run.log_dir() / "info.log").read_text()
    assert_same(run, undisturbed[1][0])


def test_stopped_while_the_memory_is_chosen(undisturbed, attempt, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(replay, "find_candidates", lambda *args: send(signal.SIGTERM)())
        with pytest.raises(Interrupted):
            attempt(1)
    assert not (attempt.folder(1) / "memory.json").exists()
    assert_same(attempt(1), undisturbed[1][1])


def test_exit_code_of_a_stopped_run(capsys):
    with pytest.raises(SystemExit) as ended, one_sentence_errors(), signals.watch():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == EXIT_INTERRUPTED == 75
    assert capsys.readouterr().err.endswith(": stopped by SIGTERM.\n")


def test_only_an_impatient_second_ctrl_c_tears_an_iteration_apart(monkeypatch):
    with signals.watch():
        signals.defer_signals()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # at once: the same request
            os.kill(os.getpid(), number)
        assert signals.pending_signal() == "SIGINT"
        monkeypatch.setattr(signals, "PATIENCE", -1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_further_signals_do_not_tear_the_clearing_up_apart():
    """A launcher passes on what the whole group has got already."""
    cleared = []
    with signals.watch():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            cleared.append(1)
    assert cleared


def test_a_non_finite_loss_is_not_saved_by_a_signal(attempt, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("trainer.step_log.READ_EVERY", 1000)
        patch.setattr(Trainer, "train_step", after(2, Trainer.train_step, send(signal.SIGTERM)))
        with pytest.raises(UserError, match="not finite"):
            attempt(0, "--lr", "1e30")
    assert not (attempt.folder(0) / "last.pth").exists()


# ------------------------------------------------------------------------------ from start to exit
# What `python train_voc.py …` does, with a signal at a chosen moment.
ENTRY = """
import os, runpy, signal, sys

def strike(*_):
    os.kill(os.getpid(), signal.{signal})

{moment}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WHEN_IMPORTED = """
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "{module}":
            strike()

sys.meta_path.insert(0, Finder)
"""
# Late is cleared away when the interpreter has already given up Python's handlers.
AT_EXIT = """
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{signal}):
        kill(pid, number)

import atexit
atexit.register(strike)
late = Late()
"""


def entry(moment, number, *arguments):
    code = ENTRY.format(moment=moment.replace("{signal}", number), signal=number)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("module", "number"),
    [("utils.parse_config", "SIGINT"), ("torch._C", "SIGUSR1"), ("trainer.trainer", "SIGTERM")],
)
def test_a_signal_while_an_entry_script_starts(toy_config, module, number):
    """Among them the import of a C extension, which would make another error of an exception."""
    done = entry(WHEN_IMPORTED.format(module=module), number, "train_voc.py", "-c", str(toy_config))
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert done.stderr == f"train_voc.py: stopped by {number}.\n"
    assert not (toy_config.parent / "runs").exists()


def test_a_signal_while_a_run_with_nothing_to_do_exits(undisturbed):
    flags = ("-c", str(undisturbed[0]), "-d", "cpu", *FLAGS[0], "-r", "auto")
    done = entry(AT_EXIT, "SIGUSR1", "train_voc.py", *flags)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("processes", [(), ("--multiprocessing_distributed",)])
@pytest.mark.slow
def test_a_signal_while_a_finished_evaluation_exits(undisturbed, tmp_path, processes):
    config, (zero, _) = undisturbed
    weights = zero.step_dir() / files.epoch_file(3)
    flags = ("-c", str(config), "-d", "cpu", "-r", str(weights), "--save_dir", str(tmp_path))
    done = entry(AT_EXIT, "SIGTERM", "eval_voc.py", *flags, *processes)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("metrics.json"))


def test_what_an_import_makes_of_an_interruption():
    """A library may turn the exception into one of its own."""

    def library():
        try:
            send(signal.SIGUSR1)()
        except Interrupted:
            raise ImportError("initialization failed") from None

    with pytest.raises(Interrupted, match=r"stopped by SIGUSR1\."), signals.watch():
        library()


# --------------------------------------------------------------------------------------- -r auto
def test_auto_leaves_a_finished_step_alone(attempt, capsys):
    run = attempt(0)
    times = {path: path.stat().st_mtime_ns for path in run.step_dir().iterdir()}
    capsys.readouterr()
    attempt(0)
    assert "is finished, see" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in run.step_dir().iterdir()}


def test_auto_with_other_settings(attempt):
    attempt(0)
    with pytest.raises(UserError) as caught:
        attempt(0, "--lr", "0.5", "--seed", "9", "--pos_weight", "3")
    for part in (
        "holds a finished step of another run",
        "seed is 9 here and 1 there",
        "optimizer.args.lr is 0.5 here and 0.001 there",
        "hyperparameter.pos_weight is 3.0 here and 2.0 there",
    ):
        assert part in str(caught.value)


def interrupted_after(attempt, monkeypatch, iterations, step=0):
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "train_step", after(iterations, Trainer.train_step, send(signal.SIGTERM))
        )
        with pytest.raises(Interrupted):
            attempt(step)


def test_continuing_with_other_settings(attempt, monkeypatch):
    interrupted_after(attempt, monkeypatch, 6)
    with pytest.raises(UserError, match=r"of another run: optimizer\.args\.lr is 0\.5 here"):
        attempt(0, "--lr", "0.5")


DECISIVE = [
    ("optimizer.args.weight_decay", 0.5),
    ("lr_scheduler.args.power", 2),
    ("trainer.clip_grad_norm", 1),
    ("hyperparameter.ac", 0),
    ("data_loader.args.train.args.masking_value", 255),
    *(
        pytest.param(key, value, marks=pytest.mark.slow)
        for key, value in (
            ("optimizer.args.momentum", 0.5),
            ("optimizer.args.nesterov", False),
            ("lr_scheduler.args.min_lr", 0.0005),
            ("seed", 9),
            ("use_amp", False),
            ("arch.args.freeze_all_bn", True),
            ("data_loader.args.train.args.transform_args.crop_size", 48),
            ("data_loader.args.val.cross_val", True),
        )
    ),
]


@pytest.fixture(scope="module")
def stopped(undisturbed, tmp_path_factory):
    """The folder of runs whose step 0 was stopped, and the line that goes on with it."""
    saved = tmp_path_factory.mktemp("stopped") / "runs"
    line = (undisturbed[0], *FLAGS[0], "--save_dir", str(saved))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", after(2, Trainer.train_step, send(signal.SIGTERM)))
        with pytest.raises(Interrupted):
            train(*line)
    (last,) = saved.rglob("last.pth")
    return (*line, "-r", str(last))


@pytest.mark.parametrize(("key", "value"), DECISIVE)
def test_every_setting_that_decides_is_compared_on_resuming(stopped, key, value):
    with pytest.raises(UserError, match=r"of another run: ") as caught:
        train(*stopped, "--set", f"{key}={json.dumps(value)}")
    shown = float(value) if key.startswith("hyperparameter.") else value
    assert f"{key} is {shown} here and " in str(caught.value)


def test_settings_of_the_memory_are_compared_on_resuming(attempt, monkeypatch):
    interrupted_after(attempt, monkeypatch, 2, step=1)
    name = "data_loader.args.memory.labels"
    with pytest.raises(UserError, match=f"of another run: .*{name} is stored here and current"):
        attempt(1, "--set", f"{name}=stored")


def test_the_batch_of_a_recipe_is_shared_out(toy_root, tmp_path):
    """To processes and accumulated batches."""
    config = write_config(tmp_path / "toy.json", toy_root)
    tree = json.loads(config.read_text()) | {"n_gpu": 2}
    del tree["data_loader"]["args"]["train"]["batch_size"]
    config.write_text(json.dumps(tree))
    two = ("--multiprocessing_distributed",)
    for flags, size in ((two, 16), ((*two, "--accumulate", "2"), 8)):
        argv = ["-c", str(config), *flags]
        parsed = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
        start = plan_run([parsed]).first
        assert start.config["data_loader"]["args"]["train"]["batch_size"] == size
    run = train(config, "--epochs", "1", "--accumulate", "4")
    written = json.loads((run.step_dir() / "config.json").read_text())
    assert written["data_loader"]["args"]["train"]["batch_size"] == 8
    assert "global batch: 32" in (run.log_dir() / "info.log").read_text()


def test_settings_that_decide_nothing_may_change_on_resuming():
    """All other keys of the config decide the weights, so that a new one does until it is known."""
    free = {key for key, rule in SCHEMA.items() if not rule.decides}
    assert free == {
        *("name", "n_gpu", "multiprocessing_distributed", "rank", "world_size", "dist_backend"),
        *("dist_url", "eval_amp", "evaluator.type", "metrics"),
        *(f"fast.{key}" for key in ("channels_last", "fold_bn", "fused_optimizer", "compile")),
        *(
            f"data_loader.args.{key}"
            for key in ("data_dir", "follow_links", "saliency_dir", "num_workers", "pin_memory")
        ),
        *(
            f"data_loader.args.task.{key}"
            for key in ("name", "step", "idxs_path", "steps", "joint")
        ),
        "data_loader.args.train.batch_size",
        *(
            f"data_loader.args.{kind}.{key}"
            for kind in ("val", "test")
            for key in (
                "args.transform",
                "args.transform_args.crop_size",
                "args.masking_value",
                "batch_size",
            )
        ),
        *(
            f"trainer.{key}"
            for key in (
                *(
                    "accumulate",
                    "save_dir",
                    "save_period",
                    "keep",
                    "validation_period",
                    "verbosity",
                ),
                *("monitor", "reset_best_mnt", "tensorboard"),
            )
        ),
    }


def damage(path, how):
    whole = bytearray(path.read_bytes())
    path.unlink()  # other names of the same file stay whole
    if how == "altered":
        whole[len(whole) // 2] ^= 4
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "altered": whole}[how])


@pytest.mark.parametrize(
    "how",
    ["cut", *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "altered"))],
)
def test_a_damaged_checkpoint_is_skipped_for_the_older_one(undisturbed, attempt, monkeypatch, how):
    interrupted_after(attempt, monkeypatch, 10)
    damage(attempt.folder(0) / "last.pth", how)
    run = attempt(0)
    log = (run.log_dir() / "info.log").read_text()
    assert f"skipped: checkpoint {attempt.folder(0) / 'last.pth'}" in log
    assert f"-r auto: {attempt.folder(0) / 'previous.pth'}" in log
    assert_same(run, undisturbed[1][0])


def test_only_damaged_checkpoints_mean_a_fresh_start(undisturbed, attempt, monkeypatch):
    interrupted_after(attempt, monkeypatch, 10)
    for name in ("last.pth", "previous.pth"):
        damage(attempt.folder(0) / name, "cut")
    run = attempt(0)
    log = (run.log_dir() / "info.log").read_text()
    assert log.count("skipped: checkpoint") == 2
    assert "a fresh start" in log
    assert_same(run, undisturbed[1][0])


@pytest.mark.parametrize("altered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kept_epoch_is_gone_on_from_when_the_newer_ones_are_damaged(
    undisturbed, attempt, monkeypatch, altered
):
    """The newest that is whole."""
    kept = ("--set", "trainer.save_period=1")
    each = iterations(undisturbed[1][0])
    with monkeypatch.context() as patch:
        stop = after(2 * each + 1, Trainer.train_step, send(signal.SIGTERM))
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(Interrupted):
            attempt(0, *kept)
    names = ["last.pth", "previous.pth", *(["checkpoint-epoch2.pth"] if altered else [])]
    for name in names:
        damage(attempt.folder(0) / name, "cut")
    run = attempt(0, *kept)
    log = (run.log_dir() / "info.log").read_text()
    assert log.count("skipped: checkpoint") == len(names)
    epoch = 1 if altered else 2
    assert f"-r auto: {attempt.folder(0) / files.epoch_file(epoch)}" in log
    assert f": epoch {epoch} is done\n" in log
    assert_same(run, undisturbed[1][0])
    assert losses(run) == losses(undisturbed[1][0])


def test_torch_alone_would_load_an_altered_checkpoint(undisturbed, tmp_path):
    """Why checkpoints are verified: this is what the checksum is for."""
    path = tmp_path / "altered.pth"
    shutil.copy(undisturbed[1][0].step_dir() / "last.pth", path)
    damage(path, "altered")
    torch.load(path, weights_only=True)
    with pytest.raises(files.Damaged, match=r"the checksum of its record .* is wrong"):
        files.load(path)


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("checkpoint", [1, 2])
def test_a_full_disk_while_saving(undisturbed, attempt, monkeypatch, checkpoint):
    """Files may not become larger than half a checkpoint: as on a full disk, writing fails."""
    size = (undisturbed[1][0].step_dir() / "last.pth").stat().st_size
    each = iterations(undisturbed[1][0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = (size // 2, before[1])
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "train_step",
            after(
                each * checkpoint - 1,
                Trainer.train_step,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limited),
            ),
        )
        try:
            with pytest.raises(UserError, match=r"last\.pth cannot be written.*-r auto") as caught:
                attempt(0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "MiB left" in str(caught.value)
    present = {path.name for path in attempt.folder(0).glob("*.pth")}
    assert present == (set() if checkpoint == 1 else {"last.pth"})
    assert not list(attempt.folder(0).glob("*.part"))
    assert not list(attempt.folder(0).glob(".*.part"))
    if checkpoint == 2:
        assert files.load(attempt.folder(0) / "last.pth")["epoch"] == 1
    assert_same(attempt(0), undisturbed[1][0])


def test_an_image_that_breaks_in_the_middle_of_an_epoch(toy_root, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(toy_root, root)
    config = write_config(tmp_path / "toy.json", root)
    flags = (*FLAGS[0], "-r", "auto")
    expected = train(config, *flags, "--name", "whole")
    victim = next((root / "JPEGImages").iterdir())
    whole = {path: path.read_bytes() for path in (root / "JPEGImages").iterdir()}
    victims = [path for path in whole if path.stem < "toy_000024"]

    def corrupt():
        for victim in victims:
            victim.write_bytes(whole[victim][:300])

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", after(5, Trainer.train_step, corrupt))
        with pytest.raises(UserError, match=r"train_aug\.txt, line \d+: image .*cannot be read"):
            train(config, *flags)
    for victim in victims:
        victim.write_bytes(whole[victim])
    assert_same(train(config, *flags), expected)


def test_a_log_file_on_a_full_disk_does_not_stop_the_run(tmp_path, capsys):
    setup_logger(tmp_path / "info.log")
    (handler,) = [one for one in log.handlers if isinstance(one, logging.FileHandler)]
    handler.stream.close()
    handler.stream = open("/dev/full", "w")  # noqa: SIM115
    log.info("one")
    log.info("two")
    close_logger()
    out, err = capsys.readouterr()
    assert "the log goes on without" in out
    assert out.index("No space left on device") < out.index("two")
    assert "Traceback" not in out + err


PINNED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA pins memory; -m gpu"),
]


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=PINNED)])
def test_a_broken_image_ends_the_run_at_once(toy_root, tmp_path, pinned):
    """Also when loading processes are left to end: they heed their parent, and only that."""
    root = tmp_path / "data"
    shutil.copytree(toy_root, root)
    for path in sorted((root / "JPEGImages").iterdir())[:40]:
        path.write_bytes(path.read_bytes()[:300])
    config = write_config(tmp_path / "toy.json", root)
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"] |= {"num_workers": 2, "pin_memory": pinned}
    config.write_text(json.dumps(tree))
    done = subprocess.run(
        [sys.executable, "train_voc.py", "-c", str(config), "-d", "0" if pinned else "cpu"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train_voc.py: error: ")
    assert "Traceback" not in done.stderr


def test_loading_processes_outlive_signals_to_the_whole_group(tmp_path):
    """SIGTERM and SIGINT from anybody but the parent leave them alone."""

    def load():
        children.leave_to_parent()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        (tmp_path / "alive").touch()
        time.sleep(60)

    process = get_context("fork").Process(target=load)
    process.start()
    while not (tmp_path / "alive").exists():
        time.sleep(0.01)
    assert process.is_alive()
    # Signals of one number do not queue: one of its own that waits still would swallow ours.
    for _ in range(10):
        process.terminate()
        process.join(3)
        if process.exitcode is not None:
            break
    assert process.exitcode == 0


def test_a_loading_process_ends_when_its_parent_did_before_it_was_ready():
    """It would hold the pipe by whose end a launcher notices that a rank has ended."""
    end, pipe = os.pipe()
    rank = os.fork()
    if rank == 0:

        def load(parent):
            while os.getppid() == parent:
                time.sleep(0.01)
            children.leave_to_parent()
            os.write(pipe, b"still there")

        get_context("fork").Process(target=load, args=(os.getpid(),)).start()
        os._exit(0)
    os.close(pipe)
    os.waitpid(rank, 0)
    assert os.read(end, 20) == b""
    os.close(end)


def test_one_folder_for_one_process(undisturbed, tmp_path):
    """A second process is refused; the claim ends with its owner, even with kill -9."""
    folder = tmp_path / "step_0"
    code = (
        "import sys, time; from pathlib import Path; from utils import checkpoint as files\n"
        f"with files.claim(Path({str(folder)!r})): print('mine', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert owner.stdout.readline() == b"mine\n"
    (folder / ".last.pth.x.part").touch()
    with pytest.raises(UserError, match="another process is writing to"), files.claim(folder):
        pass
    assert (folder / ".last.pth.x.part").exists(), "it may be being written"
    owner.kill()
    owner.wait()
    with files.claim(folder):
        assert not (folder / ".last.pth.x.part").exists()
    owner.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["writing", "rank"])
def test_chaos(tmp_path, monkeypatch, kind):
    """A short form of `scripts/chaos.py`, which tries every kind of fault several times."""
    monkeypatch.setattr(Job, "steps", (0,))
    Chaos(tmp_path).trial(kind, random.Random(4))


# ------------------------------------------------------------------------------- shared base steps
def test_a_base_step_of_another_run(undisturbed, toy_root, tmp_path):
    """15-1 takes the step 0 of 15-5, and goes on from it."""
    _, (zero, _) = undisturbed
    other = write_config(tmp_path / "toy.json", toy_root, name="15-1")
    run = train(other, *FLAGS[0], "--base", str(zero.step_dir()))
    assert_same(run, zero)
    file = files.epoch_file(3)
    assert (run.step_dir() / file).samefile(zero.step_dir() / file)
    origin = json.loads((run.step_dir() / "base.json").read_text())
    assert origin["checkpoint"] == str((zero.step_dir() / file).resolve())
    train(other, *FLAGS[0], "--base", str(zero.step_dir()), "-r", "auto")  # nothing to do
    step1 = train(other, *FLAGS[1], "--epochs", "1", "--bs", "2")
    assert metrics(step1)["step"] == 1


def test_a_base_step_of_other_settings_is_refused(undisturbed, toy_root, tmp_path):
    _, (zero, _) = undisturbed
    other = write_config(tmp_path / "toy.json", toy_root, name="10-1")
    with pytest.raises(UserError) as caught:
        train(
            other,
            *("--epochs", "4", "--seed", "2", "--lr", "0.1", "--bs", "4", "--pos_weight", "5"),
            *("--task_setting", "disjoint", "--method", "finetune", "--base", str(zero.step_dir())),
        )
    for name in (
        *("setting is disjoint", "classes is [[1, 2", "trainer.epochs is 4", "seed is 2"),
        *("optimizer.args.lr is 0.1", "global batch is 4", "hyperparameter.pos_weight is 5.0"),
        *("method is finetune",),
    ):
        assert f"{name}" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_base_step_that_was_stopped_is_refused(undisturbed, attempt, monkeypatch):
    """Though it has a kept checkpoint."""
    each = iterations(undisturbed[1][0])
    with monkeypatch.context() as patch:
        stop = after(each + 1, Trainer.train_step, send(signal.SIGTERM))
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(Interrupted):
            attempt(0, "--set", "trainer.save_period=1")
    base = attempt.folder(0)
    assert (base / files.epoch_file(1)).is_file()
    with pytest.raises(UserError, match="is not of a finished step"):
        train(undisturbed[0], *FLAGS[0], "--name", "other", "--base", str(base))


def test_a_base_step_of_other_data_is_refused(undisturbed, toy_root, tmp_path):
    _, (zero, _) = undisturbed
    root = tmp_path / "data"
    shutil.copytree(toy_root, root)
    victim = next((root / "SegmentationClassAug").iterdir())
    victim.write_bytes(victim.read_bytes() + b"\0")
    other = write_config(tmp_path / "toy.json", root, name="15-1")
    with pytest.raises(UserError, match="the training data have the hash"):
        train(other, *FLAGS[0], "--base", str(zero.step_dir()))
    assert not list((tmp_path / "runs/models").rglob("*.pth"))


@pytest.mark.slow
def test_a_base_step_of_other_pretrained_weights(toy_root, tmp_path):
    """They are known by what the file holds, wherever it lies."""
    config = write_config(tmp_path / "toy.json", toy_root)
    weights = [tmp_path / name for name in ("one.pth", "other.pth", "copy.pth")]
    for path in weights[:2]:
        torch.save(DeepLabV3(HeadPlan((1,)), backbone="tiny").backbone.state_dict(), path)
    shutil.copy(weights[0], weights[2])

    def run(path, *flags):
        pretrained = f"arch.args.backbone_pretrained={json.dumps(str(path))}"
        return train(config, "--epochs", "1", "--set", pretrained, *flags)

    base = ("--base", str(run(weights[0]).step_dir()))
    with pytest.raises(UserError, match=r"arch\.args\.backbone_pretrained is .* here and .* there"):
        run(weights[1], "--name", "other", *base)
    run(weights[2], "--name", "copy", *base)


def test_versions_are_compared(undisturbed):
    _, (zero, _) = undisturbed
    mine = files.load(zero.step_dir() / "last.pth")["record"]
    assert mine["code"] == code_hash()
    assert differences(mine, mine) == remarks(mine, mine) == []
    assert differences(mine, {**mine, "version": "0.1"}) == [
        f"the code's version is {mine['version']} here and 0.1 there"
    ]
    assert remarks(mine, {**mine, "code": "f00"}) == [
        f"source files (hash): {mine['code']} here, f00 there"
    ]


# ------------------------------------------------------------------------------------ accumulation
def test_accumulated_batches_equal_a_larger_one(undisturbed, attempt):
    """Exact with frozen BN: the same images in every iteration, the same mean gradient."""
    _, (_, one) = undisturbed
    run = attempt(1, "--bs", "2", "--accumulate", "2")
    log = (run.log_dir() / "info.log").read_text()
    assert "global batch: 4" in log
    a, b = (files.load(r.step_dir() / files.epoch_file(3)) for r in (run, one))
    assert a["lr_scheduler"] == b["lr_scheduler"]
    assert a["record"] == b["record"], "it may be continued with the other"
    for name, value in b["state_dict"].items():
        torch.testing.assert_close(a["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    lines = [
        [line.split("loss ")[1].split(",")[0] for line in text.splitlines() if "loss " in line]
        for text in (log, (one.log_dir() / "info.log").read_text())
    ]
    assert len(lines[0]) == 3
    np.testing.assert_allclose(
        [float(x) for x in lines[0]], [float(x) for x in lines[1]], atol=2e-4
    )


def test_accumulation_is_another_run_where_batch_norm_learns(attempt, monkeypatch):
    """The same global batch, but BatchNorm would see half of it."""
    interrupted_after(attempt, monkeypatch, 6)
    with pytest.raises(UserError, match=r"another run: images that BatchNorm sees is 4 here and 8"):
        attempt(0, "--bs", "4", "--accumulate", "2")


def test_an_interrupted_run_goes_on_with_accumulation(undisturbed, attempt, monkeypatch):
    interrupted_after(attempt, monkeypatch, 5, step=1)
    run = attempt(1, "--bs", "1", "--accumulate", "4")
    a, b = (files.load(r.step_dir() / files.epoch_file(3)) for r in (run, undisturbed[1][1]))
    for name, value in b["state_dict"].items():
        torch.testing.assert_close(a["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def log_of(config, caplog, *flags):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dkd"):
        parsed = train(config, *flags)
    return (parsed.log_dir() / "info.log").read_text()


def test_a_run_is_compared_with_the_recipe(toy_root, tmp_path, caplog):
    """On VOC's own classes one warning tells all that the published runs have otherwise."""
    config = write_config(tmp_path / "toy.json", toy_root)
    tree = json.loads(config.read_text())
    del tree["data_loader"]["args"]["class_names"]
    config.write_text(json.dumps(tree))
    recipe = "WARNING figures will differ from the published ones, whose recipe is configs/recipes"
    flags = ("--epochs", "1")
    log = log_of(config, caplog, *flags, "--name", "a")
    assert log.count(recipe) == 1
    assert "trainer.epochs is 1 instead of 60" in log
    assert "the global batch is 8 instead of 32 (change --batch_size" in log
    assert "BatchNorm: statistics over 8 images" in log
    log = log_of(config, caplog, *flags, "--accumulate", "4", "--name", "b")
    assert "the global batch is" not in log
    assert "BatchNorm sees 8 images at a time instead of 32" in log
    log = log_of(config, caplog, *flags, "--bs", "32", "--name", "c")
    assert "BatchNorm sees" not in log
    assert "trainer.epochs is 1 instead of 60" in log
    log = log_of(config, caplog, *flags, "--task_step", "1", "--name", "c", "--lr", "0.5")
    assert "BatchNorm: frozen, with the statistics of the weights it starts from" in log
    assert "optimizer.args.lr is 0.5 instead of 0.0001" in log
    log = log_of(config, caplog, "--task_step", "1", "--name", "c", "--no-freeze_bn", "--test")
    assert recipe not in log.split("trainer.epochs is 1")[-1], "a test trains nothing"
