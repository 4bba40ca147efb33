"""Processes of a run: how they start, meet, hear signals and end.

The training loop sees none of it but `utils.ranks.Ranks` and the exception `Interrupted`.
"""
