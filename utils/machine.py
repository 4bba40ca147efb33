"""What this machine gives a process: cores and memory."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path


def address_space() -> int | None:
    """Bytes of address space that a process may have (`ulimit -v`), where that is limited."""
    try:
        import resource
    except ImportError:  # no POSIX system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit() -> int | None:
    """Bytes that a process may have at most: of the machine, its container, its address space."""
    limits = [address_space()]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no POSIX system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # no such container, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min((limit for limit in limits if limit is not None), default=None)


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of one image for the next; whoever reads many calls it.

    glibc returns freed memory to the system as soon as twice its largest block freed so far lies
    idle: after nearly every image, and taking it back, page by page, cost a third of a sample. One
    large block, freed untouched, ends that; a second one would be taken from what is kept.
    """
    bytes(16 << 20)
