"""Loading processes that die, hang or find no room."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from data_loader.loading import Loader
from utils.errors import UserError
from utils.processes import children

WORKER = {
    "num_workers": 1,
    "multiprocessing_context": "fork",
    "worker_init_fn": children.leave_to_parent,
}


class Failing(Dataset):
    """Samples that fail as the system makes them, or that come late."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.fault)
        return torch.zeros(1)


def hang(number):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(600)


def test_a_loading_process_that_hangs_is_told(monkeypatch):
    """As one that waits for a lock which another thread held at the fork."""
    list(Loader(Failing(0), **WORKER))
    handler = signal.getsignal(signal.SIGCHLD)  # torch's, which it sets only once
    monkeypatch.setattr(Loader, "limit", 1)
    with pytest.raises(UserError, match=r"^no batch has come from 2 loading process\(es\) for 1 s"):
        next(iter(Loader(Failing(0), **WORKER | {"num_workers": 2, "worker_init_fn": hang})))
    for process in multiprocessing.active_children():
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (RuntimeError("unable to allocate shared memory(shm) for file </t>"), "/dev/shm; .*--shm-"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device"), "/dev/shm"),
        (OSError(24, "Too many open files"), r"ulimit -n 65536\), or set .*num_workers"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "ulimit -v"),
        (MemoryError(), "no more memory; set data_loader.args.num_workers or the batch size"),
        pytest.param(
            *("killed", "a loading process died, most likely killed because the memory is full"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_loading_process_that_fails_is_told_with_the_remedy(fault, says):
    loader = Loader(Failing(fault), **WORKER)
    with pytest.raises(UserError, match=says) as caught:
        list(loader)
    assert str(caught.value).endswith("continue with -r auto.")


@pytest.mark.slow
def test_a_loading_process_whose_death_went_unheard_is_told():
    """Its signal came where an exception is swallowed, such as in a destructor."""
    list(Loader(Failing(0), **WORKER))  # sets torch's handler
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(UserError, match="a loading process died"):
            list(Loader(Failing("killed"), **WORKER))
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_what_nobody_knows_of_a_loading_process_stays_as_it_is():
    with pytest.raises(ZeroDivisionError):
        list(Loader(Failing(ZeroDivisionError()), **WORKER))
    with pytest.raises(RuntimeError, match="shared memory"):
        list(Loader(Failing(RuntimeError("shared memory")), num_workers=0))


def test_slow_loading_is_told(monkeypatch, caplog):
    monkeypatch.setattr(Loader, "patience", 0.2)
    with caplog.at_level(logging.WARNING, logger="dkd"):
        assert len(list(Loader(Failing(0), **WORKER))) == 2
        assert not caplog.messages
        list(Loader(Failing(0.5), **WORKER))
    assert "no batch has come for" in caplog.messages[0]
