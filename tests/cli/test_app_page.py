"""The page of `mvsplit app` in a real browser, served by the command itself in another process.

It needs the extra `app` and, on Debian, `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from mvsplit.cli import app_page, main
from mvsplit.cli.app_page import QUIET
from mvsplit.sampling import read_record
from mvsplit.training import train
from tests.diagnostics.browser import Keys, Page, needs_browser, start_browser
from tests.slow import slow
from tests.training import runs

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(
    not HAS_GRADIO, reason="the extra is not installed: pip install 'mvsplit[app]'"
)
ROOT = Path(__file__).parents[2]
# Notes every address outside of this machine that the server looks up or connects to.
SPY = """
import os, socket
def noting(call):
    def spied(*args, **kwargs):
        words = [str(a) for a in args if isinstance(a, (str, bytes, tuple))]
        if words and not any(h in words[0] for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0")):
            with open(os.environ["SPIED"], "a") as file:
                file.write(words[0] + "\\n")
        return call(*args, **kwargs)
    return spied
socket.getaddrinfo = noting(socket.getaddrinfo)
class Socket(socket.socket):
    def connect(self, address):
        return noting(super().connect)(address)
    def connect_ex(self, address):
        return noting(super().connect_ex)(address)
socket.socket = Socket
"""


@dataclass(frozen=True, kw_only=True)
class App:
    url: str
    process: Any
    run: Path
    spied: Path
    temporary: Path


# The command with a queue for so many.
SHORT_QUEUE = """
import sys
from mvsplit.cli import app_page, main
app_page._WAITING = int(sys.argv.pop(1))
sys.exit(main())
"""


@contextmanager
def started(folder: Path, waiting: int = 16) -> Iterator[App]:
    """The command on a run of one step, in a process that notes whom it talks to."""
    # Deep enough for 200 steps to take seconds, in which a drawing can be previewed and stopped.
    deep = replace(runs.experiment(steps=1, device="cpu"), model=replace(runs.MODEL, depth=48))
    train(deep, folder / "digits")
    for name in ("spy", "temporary"):
        (folder / name).mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'spy'}{os.pathsep}{ROOT}",
        "SPIED": str(folder / "spied.txt"),
        "TMPDIR": str(folder / "temporary"),
    }
    command = [sys.executable, "-c", SHORT_QUEUE, str(waiting)]
    if waiting == app_page._WAITING:
        command = [sys.executable, "-m", "mvsplit"]
    command += ["app", str(folder / "digits"), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            said = process.stdout.readline()
            assert said == f"drawing at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", said
            yield App(
                url=said.split()[2],
                process=process,
                run=folder / "digits",
                spied=folder / "spied.txt",
                temporary=folder / "temporary",
            )
        finally:
            process.kill()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with started(tmp_path_factory.mktemp("app")) as app:
        yield app


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


class AppPage(Page):
    """The page, and what its visitor does."""

    def visit(self, url: str) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(url)
        self.wait("return document.querySelector('#draw') && document.querySelector('#prompt')")

    def fill(self, field: str, value: str) -> None:
        box = self.find(f"#{field} textarea, #{field} input[type=number], #{field} input")
        box.send_keys(Keys.CONTROL + "a")
        box.send_keys(value, Keys.TAB)

    def status(self) -> str:
        return self.find("#status").text

    def pictures(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('#gallery img')].map((i) => i.src)")


@pytest.fixture
def page(app: App, driver: Any) -> Iterator[AppPage]:
    """A fresh page; whatever a test does with it, it must not complain or reach out."""
    page = AppPage(driver)
    page.visit(app.url)
    yield page
    assert page.complaints() == []
    hosts = {
        urlsplit(url).netloc for url in page.requests() if not url.startswith(("data", "blob"))
    }
    assert hosts == {urlsplit(app.url).netloc}
    assert not app.spied.exists() or app.spied.read_text() == ""


@needs_gradio
@needs_browser
def test_a_visitor_draws_and_takes_the_pictures_home(app, page, tmp_path):
    for field, value in (("prompt", "seven"), ("pictures", "2"), ("seed", "5"), ("steps", "3")):
        page.fill(field, value)
    page.find("#draw").click()
    page.wait("return document.querySelectorAll('#gallery img').length == 2")
    page.wait("return document.querySelector('#status').innerText.includes('2 drawn in')")
    assert "6 passes of the network each" in page.status()
    options = ["--prompt", "seven", "-n", "2", "--seed", "5", "--steps", "3", "--device", "cpu"]
    assert main(["sample", str(app.run), *options, "--out", str(tmp_path / "out")]) == 0
    for index, url in enumerate(page.pictures()):
        with urllib.request.urlopen(url) as answer:
            content = answer.read()
        (tmp_path / "home.png").write_bytes(content)
        record = read_record(tmp_path / "home.png")
        assert (record["prompt"], record["seed"], record["index"]) == ("seven", 5, index)
        expected = Image.open(tmp_path / "out" / f"{index:05d}.png")
        assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(expected)).all()


@needs_gradio
@needs_browser
def test_a_word_it_does_not_know_is_said_on_the_page(page):
    page.fill("prompt", "elefant")
    page.find("#draw").click()
    page.wait("return document.querySelector('#status').innerText.includes('unknown word')")
    assert "elefant" in page.status()
    assert page.pictures() == []


@needs_gradio
@needs_browser
def test_a_long_drawing_is_previewed_and_can_be_stopped(page):
    for field, value in (("pictures", "16"), ("steps", "200"), ("prompt", "three")):
        page.fill(field, value)
    page.find("#draw").click()
    page.wait("return document.querySelector('#preview img')")
    assert "of 200" in page.status()
    page.find("#stop").click()
    page.wait("return document.querySelector('#status').innerText.includes('Stopped')")
    page.fill("steps", "1")  # the next wish does not wait for the one that was left
    page.find("#draw").click()
    page.wait("return document.querySelectorAll('#gallery img').length == 16")


@needs_gradio
@needs_browser
def test_who_waits_can_stop_and_wish_again_while_another_draws(app, page, driver):
    says = "return document.querySelector('#status').innerText.includes('{}')".format
    for field, value in (("pictures", "16"), ("steps", "200"), ("prompt", "three")):
        page.fill(field, value)
    page.find("#draw").click()
    page.wait("return document.querySelector('#preview img')")
    one = driver.current_window_handle
    driver.switch_to.new_window("tab")
    other = driver.current_window_handle
    try:
        page.visit(app.url)
        page.find("#draw").click()
        page.wait(says("Waiting"))
        page.find("#stop").click()
        page.wait(says("Stopped"))
        page.fill("pictures", "3")
        page.find("#draw").click()
        page.wait(says("Waiting"))
        page.fill("pictures", "2")
        page.find("#prompt textarea, #prompt input").send_keys(Keys.ENTER)
        driver.switch_to.window(one)
        assert "of 200" in page.status()  # another's stop is not for this one
        page.find("#stop").click()
        page.wait(says("Stopped"))
        driver.switch_to.window(other)
        for wished in (3, 2):  # and not the four that were stopped
            page.wait(f"return document.querySelectorAll('#gallery img').length == {wished}")
        page.wait(says("2 drawn in"))
    finally:
        driver.switch_to.window(other)
        driver.close()
        driver.switch_to.window(one)


@needs_gradio
@needs_browser
@slow
def test_a_full_queue_is_said_with_what_to_do(tmp_path, driver):
    says = "return document.querySelector('#status').innerText.includes('{}')".format
    page, one = AppPage(driver), driver.current_window_handle
    with started(tmp_path, waiting=1) as app:
        page.visit(app.url)
        for field, value in (("pictures", "16"), ("steps", "200"), ("prompt", "three")):
            page.fill(field, value)
        page.find("#draw").click()
        page.wait("return document.querySelector('#preview img')")
        driver.switch_to.new_window("tab")
        try:
            page.visit(app.url)
            page.find("#draw").click()
            page.wait(says("Waiting"))
            driver.switch_to.new_window("tab")
            page.visit(app.url)
            page.find("#draw").click()
            page.wait(says("The queue is full"))
            assert "press draw again" in page.status()
            driver.switch_to.window(one)
            page.find("#stop").click()
            page.wait(says("Stopped"))
            driver.switch_to.window(driver.window_handles[1])
            page.wait(says("4 drawn in"))  # who waited is served
        finally:
            for tab in driver.window_handles[:0:-1]:
                driver.switch_to.window(tab)
                driver.close()
            driver.switch_to.window(one)


@needs_gradio
@needs_browser
def test_it_fits_a_telephone(page):
    page.driver.set_window_size(390, 900)
    try:
        page.find("#draw").click()
        page.wait("return document.querySelectorAll('#gallery img').length == 4")
        assert page.js("return document.documentElement.scrollWidth <= window.innerWidth")
        ends = "return [...document.querySelectorAll('#gallery img')].map("
        ends += "(i) => i.getBoundingClientRect().right <= window.innerWidth)"
        assert all(page.js(ends))
    finally:
        page.driver.set_window_size(1280, 1000)


@needs_gradio
def test_ctrl_c_ends_it_and_leaves_nothing_behind(tmp_path):
    with started(tmp_path) as app:
        assert len(list(app.temporary.glob("mvsplit-app-*"))) == 1
        app.process.send_signal(signal.SIGINT)
        rest, _ = app.process.communicate(timeout=60)
        assert app.process.returncode == 0, rest
        assert rest == "\nno longer drawing\n"
        assert list(app.temporary.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in (*QUIET, "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    assert main(["app", str(tmp_path)]) == 2
    assert "comes with the extra 'app': pip install 'mvsplit[app]'" in capsys.readouterr().err


def test_a_port_that_is_taken_or_is_none_is_one_line(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(tmp_path), "--port", str(port)]) == 2
    said = f"mvsplit: port={port}: is taken; choose another with --port\n"
    assert capsys.readouterr().err == said
    assert main(["app", str(tmp_path), "--port", "65536"]) == 2
    assert capsys.readouterr().err == "mvsplit: port=65536: must be from 1 to 65535\n"
