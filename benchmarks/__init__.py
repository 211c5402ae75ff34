"""Benchmarks: one file for each suite or measurement, and ``results/`` with the command of every committed number."""
