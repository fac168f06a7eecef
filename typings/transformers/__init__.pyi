# The checker would read 2,700 files of transformers for the one class that strict code takes from it, untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
