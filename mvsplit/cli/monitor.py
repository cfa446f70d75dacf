"""`mvsplit monitor ACTION …`: the watch over runs, each action in a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from mvsplit.errors import UserError, nearest

ACTIONS: dict[str, tuple[str, str]] = {  # name: (module, what it does)
    "replay": ("mvsplit.cli.replay", "say what went wrong in a run, from its logs"),
    "explain": ("mvsplit.cli.explain", "say what made the gradient of a step spike"),
    "watch": ("mvsplit.cli.watch", "follow running runs in the browser"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the action that the first argument names and returns its exit status.

    Raises:
        UserError: an unknown action.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:8}{summary}" for name, (_, summary) in ACTIONS.items())
        print(f"usage: mvsplit monitor ACTION [OPTIONS]\n\nactions:\n{rows}")
        return 0
    action, *rest = arguments
    if action not in ACTIONS:
        raise UserError(f"monitor: unknown action {action!r}; {nearest(action, ACTIONS)}")
    return import_module(ACTIONS[action][0]).main(rest)
