"""Tools of every layer; importing this package precedes importing torch."""

import os

# Raised whenever a change of the code changes what a run computes; checkpoints record it.
VERSION = "0.3"

# OpenMP threads that wait by spinning starve the loader processes and the run's neighbours: on two
# shared cores that made a training fifteen times slower. A value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
