"""How OpenMP's threads wait for work; settled before torch is imported, so without it."""

import os


def spin_briefly() -> None:
    """Let waiting threads spin for some 20 µs, then sleep; what the user has set stays.

    Threads that only spin starve loading processes and neighbours: on two shared cores that made a
    training fifteen times slower. Those that sleep at once make every step half as long again when
    alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
