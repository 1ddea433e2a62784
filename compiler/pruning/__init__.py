"""Structured pruning: what to remove from a model, decided on calibration text and repaired without training.

options -> `Pruning`; vocabulary -> a smaller `Checkpoint`; decide -> `Cuts`, which the passes `prune_*` carry out on
the float graph.
"""
