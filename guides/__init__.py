"""Guides: one file for each way to attach a density to a model, one for each family of densities. The folder is the registry."""
