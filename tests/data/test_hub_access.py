"""Where the hub has no address it is not asked, and the message says so."""

from __future__ import annotations

import socket
import time

import pytest

from mvsplit.data import hub_access
from mvsplit.data.text_encoder import QwenEncoder
from mvsplit.data.vae import Flux2Autoencoder
from mvsplit.errors import UserError

pytest.importorskip("huggingface_hub")


@pytest.fixture
def offline(monkeypatch):
    """No name is resolved, no proxy known, and whoever waits to try again is found out."""

    def fails(*_, **__):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(hub_access, "getproxies", dict)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("tried again"))


def test_options_are_those_of_what_was_kept_only_where_the_hub_has_no_address(
    offline, tmp_path, monkeypatch
):
    assert hub_access.hub_options("a/b") == {"local_files_only": True}
    assert hub_access.hub_options(str(tmp_path)) == {}
    monkeypatch.setattr(hub_access, "getproxies", lambda: {"https": "there"})
    assert hub_access.hub_options("a/b") == {}
    assert hub_access.unreached("a/b") == ""
    monkeypatch.setattr(hub_access, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert hub_access.hub_options("a/b") == {}


@pytest.mark.parametrize(
    ("load", "extra"),
    [(Flux2Autoencoder.load, "diffusers"), (QwenEncoder.load, "transformers")],
)
def test_an_id_that_cannot_be_had_is_one_line_at_once(offline, load, extra, capfd):
    pytest.importorskip(extra)
    with pytest.raises(UserError, match=r"cannot be reached from here, .* name a folder") as caught:
        load("nobody/has-this")
    assert "\n" not in str(caught.value)
    assert "Retrying" not in capfd.readouterr().err
