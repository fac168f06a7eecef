"""headway version."""

from __future__ import annotations

import headway


def run() -> int:
    print(headway.__version__)
    return 0
