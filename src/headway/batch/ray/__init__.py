"""Processors on Ray. Its modules import ray: they are imported where a dataset is given."""
