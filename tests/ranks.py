"""What the ranks of a test do; they start without all that the tests import."""

import os
import signal
import time

import torch

from utils.errors import UserError
from utils.processes import signals
from utils.processes.signals import Interrupted


def sum_of_ranks(config, ranks):
    assert ranks.sum(torch.ones(1)).item() == 2


def fail_on_rank_1(config, ranks):
    if ranks.rank == 1:
        time.sleep(0.2)
        raise ValueError("the fault of rank 1")
    ranks.sum(torch.ones(1))


def user_error_on_rank_1(config, ranks):
    if ranks.rank == 1:
        raise UserError("a sentence for the user.")
    ranks.sum(torch.ones(1))


def killed_on_rank_1(config, ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), 9)
    ranks.sum(torch.ones(1))


def deaf_on_rank_0(config, ranks):
    """As a process that waits for its GPU: Python gets no chance to handle a signal."""
    if ranks.rank == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
        time.sleep(3600)
    user_error_on_rank_1(config, ranks)


def strike():
    os.kill(os.getpid(), signal.SIGUSR1)


class StruckAtBirth:
    """A config that sends its process a signal when that reads it, before anything is set up."""

    def __reduce__(self):
        return strike, ()


class StruckAtExit:
    """What is cleared away last sends a signal."""

    def __del__(self, kill=os.kill, number=signal.SIGUSR1, getpid=os.getpid):
        kill(getpid(), number)


def no_work(config, ranks):
    pass


def strike_at_exit(config, ranks):
    global late
    late = StruckAtExit()


def library_that_swallows(config, ranks):
    try:
        strike()
    except Interrupted:
        raise ImportError("initialization failed") from None
