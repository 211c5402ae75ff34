"""Models: one file for each, with its equations, its class and a small ``example()``. The folder is the registry."""
