"""Processes of a run: how they start, meet, hear signals and end.

The training loop needs none of this: it sees `utils.ranks.Ranks`.
"""
