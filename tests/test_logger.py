"""Progress: a bar on a terminal, now and then a line in a file."""

from __future__ import annotations

import io
import sys

from tests.helpers import train
from utils import logger
from utils.logger import close_logger, log, progress, setup_logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_whole_lines_now_and_then(monkeypatch):
    """200 seconds of 1,000 iterations: one line in ten seconds, each complete, none wiped out."""
    now = [0.0]
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress(total=1000, desc="step 1", unit="it") as bar:
        for _ in range(1000):
            now[0] += 0.2
            bar.set_postfix(loss="1.0", refresh=False)
            bar.update()
    text = stream.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert 18 <= len(lines) <= 20
    assert all(line.startswith("step 1: ") and "loss=1.0" in line for line in lines)
    assert lines[9].split("|")[0].endswith("50%")


def test_short_work_writes_nothing_into_a_file(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert sum(progress(range(5000))) == 12497500
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(range(10), desc="short"):
        pass
    assert "\rshort: 100%" in stream.getvalue()


def test_log_lines_do_not_disturb_the_lines(monkeypatch, tmp_path, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logger, "LINE_EVERY", 0)
    setup_logger(tmp_path / "info.log")
    with progress(total=3) as bar:
        for _ in range(3):
            bar.update()
            log.info("between")
    close_logger()
    assert capsys.readouterr().out == "between\n" * 3
    assert "\r" not in stream.getvalue()


def test_a_run_whose_output_is_a_file(toy_config, capfd):
    train(toy_config, "--epochs", "1")
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert "epoch 1/1: loss" in out
