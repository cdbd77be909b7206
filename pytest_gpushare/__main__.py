"""`python -m pytest_gpushare` is `pytest-gpushare`."""

from __future__ import annotations

import sys

from pytest_gpushare.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
