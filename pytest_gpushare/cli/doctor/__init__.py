"""`pytest-gpushare doctor`: what is wrong here, and how to mend it."""

from __future__ import annotations

import argparse


def doctor(options: argparse.Namespace) -> int:
    """Print the findings; the exit code."""
    import sys
    import warnings

    if not sys.warnoptions:
        # The deprecated pynvml warns at its import; its finding says more.
        warnings.simplefilter("ignore")
    from pytest_gpushare.cli.doctor.render import tell

    return tell(options)
