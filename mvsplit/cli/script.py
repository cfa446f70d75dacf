"""Runs a script as Python does, but answers what goes wrong as the commands do: a mistake of the
user is one line and status 2. `mvsplit bench` begins all of its scripts so.

    python -m mvsplit.cli.script PATH [arguments of the script]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mvsplit.cli import status_of


def main() -> int:
    """Runs it in the place of this module and returns the exit status."""
    sys.argv = sys.argv[1:]
    script = sys.argv[0]
    sys.path[0] = str(Path(script).resolve().parent)

    def run() -> None:
        runpy.run_path(script, run_name="__main__")

    return status_of(run)


if __name__ == "__main__":
    sys.exit(main())
