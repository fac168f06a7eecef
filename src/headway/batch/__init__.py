"""Offline jobs over datasets."""
