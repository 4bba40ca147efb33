"""How OpenMP's threads wait for work; settled before torch is imported, so without it."""

import os


def spin_briefly() -> None:
    """Let waiting threads spin for some 20 µs, then sleep; for entry scripts, before torch.

    Threads that wait by spinning starve the loader processes and the run's neighbours: on two
    shared cores that made a training fifteen times slower. Those that sleep at once take half as
    long again for every step when nobody disturbs. In between is nearly as fast as spinning when
    alone, and a fifth slower than sleeping when two trainings share the cores. Values of the user's
    own stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
