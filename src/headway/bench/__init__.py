"""Measurements of the engine, each from one command."""
