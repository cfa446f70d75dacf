"""Whether the hub can be asked at all: where it cannot, its package tries for a minute, aloud."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from mvsplit.errors import needs_extra


def hub_options(source: str) -> dict[str, Any]:
    """Options of `from_pretrained` for a folder or hub id: of an id whose hub has no address here,
    what earlier downloads kept is read, and nothing is asked for.

    Raises:
        UserError: the extra `hub` is not installed.
    """
    return {"local_files_only": True} if _is_out_of_reach(source) else {}


def unreached(source: str) -> str:
    """What is said of it behind a failure; "" where the hub was asked."""
    if not _is_out_of_reach(source):
        return ""
    return f"; {_host()} cannot be reached from here, and nothing was kept of it: name a folder"


def _is_out_of_reach(source: str) -> bool:
    if Path(source).is_dir() or getproxies():  # a proxy knows addresses that this machine does not
        return False
    try:
        socket.getaddrinfo(_host(), None)
    except OSError:
        return True
    return False


def _host() -> str:
    with needs_extra("hub"):
        from huggingface_hub import constants
    return urlparse(constants.ENDPOINT).hostname or constants.ENDPOINT
