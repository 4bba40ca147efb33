"""Tools of every layer."""

# Raised whenever a change of the code changes what a run computes; checkpoints record it.
VERSION = "0.3"
