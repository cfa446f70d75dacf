"""`mvsplit monitor watch`: a server for this machine only, and its page in headless Chromium."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from mvsplit.cli import watch
from mvsplit.diagnostics.live import LiveReport
from mvsplit.diagnostics.live_server import LiveServer, serve
from mvsplit.errors import UserError
from tests.diagnostics.browser import Page, needs_browser, start_browser
from tests.diagnostics.synthetic import write_lines, write_run
from tests.diagnostics.test_follow import append


@contextmanager
def watching(*folders: Path) -> Iterator[LiveServer]:
    with serve(LiveReport(folders), 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: LiveServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": 1.0} for s in range(3)])
    return tmp_path


def test_it_listens_on_this_machine_only(run):
    with watching(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_news_are_told_once(run):
    with watching(run) as server:
        status, text = get(server, "/news")
        token = json.loads(text)["token"]
        assert status == 200
        assert get(server, f"/news?known={token}") == (204, "")
        append(run / "metrics.jsonl", {"step": 3, "loss": 2.0})
        status, text = get(server, f"/news?known={token}")
        assert status == 200
        assert set(json.loads(text)["runs"][0]) == {"series", "maps"}


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1"])
def test_names_of_this_machine_are_answered(run, host):
    with watching(run) as server:
        assert get(server, "/", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["example.org", "127.0.0.1.example.org", "localhost.example.org:80", "", "0.0.0.0"]
)
def test_other_names_are_refused(run, host):
    with watching(run) as server:
        for path in ("/", "/news"):
            status, text = get(server, path, Host=host)
            assert (status, text) == (403, "only for localhost\n")


@pytest.mark.parametrize(
    "path",
    [
        "/metrics.jsonl",
        "/../metrics.jsonl",
        "/%2e%2e/metrics.jsonl",
        "//etc/passwd",
        "/etc/passwd",
        "/news/../../etc/passwd",
    ],
)
def test_no_file_is_served(run, path):
    with watching(run) as server:
        assert get(server, path) == (404, "no such page\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(run, method):
    with watching(run) as server:
        assert get(server, "/", method)[0] == 501


def test_a_taken_port_gives_way_to_the_next(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve(LiveReport([run]), port) as server:
            assert port < server.server_address[1] < port + 50


def test_ctrl_c_ends_the_command(run):
    """A process of its own, as a terminal would start it."""
    (run / "early").mkdir()
    (run / "early" / "config.json").touch()
    (run / "early" / "metrics.jsonl").touch()
    command = [sys.executable, "-c", "from mvsplit.cli import watch; exit(watch.main("]
    command[-1] += f"[{str(run)!r}, {str(run / 'later')!r}, '--port', '0']))"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    waits = f"{run / 'later'} does not exist yet; waiting for it; runs that are there: "
    assert process.stdout.readline() == f"{waits}{run / 'early'}\n"
    said = process.stdout.readline()
    assert said.startswith("watching at http://127.0.0.1:")
    port = urlsplit(said.split()[2]).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "\nno longer watching\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one run folder"),
        (["{file}"], "is a file; name the folder"),
        (["{folder}", "--port", "70000"], "port=70000: must be between 0 and 65535"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    named = [a.format(file=run / "metrics.jsonl", folder=run) for a in arguments]
    with pytest.raises(UserError, match=message) as caught:
        watch.main(named)
    assert "\n" not in str(caught.value)


# In the browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@contextmanager
def watched_page(driver: Any, *folders: Path) -> Iterator[Page]:
    """The page, which must not complain and must ask nobody but its server."""
    with watching(*folders) as server:
        page = Page(driver)
        page.open(server.url)
        yield page
        driver.get("about:blank")
        assert page.complaints() == []
        others = [u for u in page.requests() if not u.startswith((server.url, "data:", "about:"))]
        assert others == []


def probe(step: int, layers: int = 4) -> dict[str, Any]:
    return {"step": step, "tcs": [0.001 * step] * layers, "rho": [1.0 + step] * layers}


@needs_browser
def test_new_lines_show_without_a_reload(driver, tmp_path):
    run = write_run(tmp_path / "run", collapses=True, steps=100, layers=4)
    with watched_page(driver, run) as page:
        page.go_to("depth")
        page.js("window.same = 'page'")
        page.pick("#metric", "tcs")
        before = page.levels(0)
        append(run / "layers.jsonl", probe(100))
        append(run / "metrics.jsonl", {"step": 100, "loss": 0.25, "new_field": 3.0})
        append(run / "events.jsonl", {"step": 100, "level": "alarm", "verdict": "divergence"})
        page.wait("return document.querySelector('#maps .plot').data[0].x.at(-1) === 100")
        page.wait("return document.getElementById('plot-loss').data[0].y.at(-1) === 0.25")
        page.wait("return document.querySelector('#field option[value=new_field]') !== null")
        after = page.levels(0)
        np.testing.assert_array_equal(after[:, :-1], before)
        np.testing.assert_allclose(after[:, -1], 253 * 0.1, atol=0.501)
        page.go_to("autopsy")
        assert "alarm: divergence" in page.find("#events").text
        assert page.js("return window.same") == "page"


@needs_browser
def test_the_selection_of_the_reader_stays(driver, tmp_path):
    run = write_run(tmp_path / "run", collapses=True, steps=100, layers=4)
    with watched_page(driver, run) as page:
        page.go_to("settings")
        page.js("document.querySelector('#settings details').open = true")
        page.go_to("depth")
        page.pick("#metric", "rho")
        page.pick("#field", "lr")
        page.find("#loss-log").click()
        page.wait("return document.querySelector('#metric-caption').textContent.includes('trunk')")
        page.js("Plotly.relayout('plot-loss', {'xaxis.range[0]': 20, 'xaxis.range[1]': 60})")
        place = page.js("document.querySelectorAll('#maps .plot')[0].mine = true; return scrollY")
        append(run / "layers.jsonl", probe(100))
        append(run / "metrics.jsonl", {"step": 100, "loss": 0.25, "lr": 0.5})
        (run / "config.json").write_text('{"seed": 7}')
        page.wait("return document.querySelector('#maps .plot').data[0].x.at(-1) === 100")
        page.wait("return document.getElementById('plot-field').data[0].y.at(-1) === 0.5")
        page.wait("return document.getElementById('settings-body').textContent.includes('7')")
        assert page.js("return [metric.value, field.value]") == ["rho", "lr"]
        assert page.js("return document.getElementById('loss-log').checked")
        assert page.js("return document.querySelector('#settings details').open")
        assert page.js("return document.querySelectorAll('#maps .plot')[0].mine")
        assert page.js("return scrollY") == place
        ranges = (
            "return ['plot-loss', 'plot-field'].map((id) =>"
            " document.getElementById(id).layout.xaxis.range.map(Math.round).join())"
        )
        assert page.js(ranges) == ["20,60", "20,60"]


@needs_browser
def test_a_run_is_awaited_followed_and_seen_to_end(driver, tmp_path):
    run = tmp_path / "later"
    status = "return document.querySelector('.live').textContent"
    with watched_page(driver, run) as page:
        assert page.js(status) == "waiting for the run to begin"
        assert "not begun" in page.find("#verdicts").text
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 0, "lo')
        page.wait(f"{status} === 'live'")
        page.wait("return !document.getElementById('verdicts').textContent.includes('not begun')")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('ss": 0.5}\n')
        page.wait("return document.getElementById('plot-loss').data?.[0].y[0] === 0.5")
        append(run / "events.jsonl", {"step": 0, "event": "finished", "message": "done"})
        page.wait(f"{status} === 'ended'")
