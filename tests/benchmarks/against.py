"""`--gpu-share` of this installation against another one, such as the last release."""

from __future__ import annotations

import argparse
import sys

from .pairs import HEAD, compare
from .scene import PYTEST, scene


def main() -> None:
    """Print the ratio of wall times, this installation first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "python",
        nargs="?",
        default=sys.executable,
        help="the interpreter in whose environment the other one is; this one shows the noise",
    )
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    this = (*PYTEST, "--gpu-share")
    other = (options.python, *this[1:])
    print(HEAD)
    with scene() as here:
        result = compare(this, other, here.path, here.environment, options.pairs)
        print(result.row("--gpu-share here / there"))


if __name__ == "__main__":
    main()
