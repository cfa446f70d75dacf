"""A page in a real browser: headless Chromium, driven over WebDriver, and what a reader does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

__all__ = ["ActionChains", "Keys", "Page", "WebDriverWait", "needs_browser", "start_browser"]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium or chromedriver is missing; on Debian: apt-get install chromium "
    "chromium-driver",
)
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=1280,1000",
)


def start_browser(profile: Path) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


class Page:
    """A page in the browser, and what a reader does with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # forgets what the page before wrote
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.wait("return document.getElementById('timeline').dataset.filled")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> Any:
        return WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda d: self.js(script))

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def go_to(self, section: str) -> None:
        self.js(f"document.getElementById('{section}').scrollIntoView()")
        self.wait(f"return document.getElementById('{section}').dataset.filled")

    def pick(self, select: str, value: str) -> None:
        Select(self.find(select)).select_by_value(value)

    def levels(self, run: int) -> np.ndarray:
        """What the map of a run draws, [L, N]."""
        script = "const p = document.querySelectorAll('#maps .plot')[arguments[0]];"
        script += "return p.data[0].z.map((row) => [...row])"
        return np.array(self.js(script, run))

    def traces(self, plot: str) -> list[dict[str, Any]]:
        script = "return document.getElementById(arguments[0]).data.map((t) =>"
        script += " ({name: t.name, yaxis: t.yaxis, x: [...t.x], y: [...t.y], text: t.text}))"
        return self.js(script, plot)

    def complaints(self) -> list[str]:
        """Console errors and warnings, uncaught errors among them."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses of all that the page asked for."""
        entries = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
            and not entry["params"]["documentURL"].startswith("chrome:")  # the browser's start page
        ]
