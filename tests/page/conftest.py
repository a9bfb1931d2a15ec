"""A server with the fake engine in its own process, and a real browser without a window."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.server.app.process import start

SECONDS = 60
BATCH_SECONDS = 0.05
EVIL = "evil.example"
"""A name that the browser resolves to this machine, as in DNS rebinding."""

RECORDER = """
window.seen = {pictures: [], texts: [], copied: ''};
new MutationObserver(() => {
  const {src, alt} = document.getElementById('picture');
  if (src && seen.pictures.at(-1)?.alt !== alt) seen.pictures.push({src, alt});
  const text = document.getElementById('status').textContent;
  if (seen.texts.at(-1) !== text) seen.texts.push(text);
}).observe(document.getElementById('output'),
           {subtree: true, childList: true, attributes: true, characterData: true});
Object.defineProperty(navigator, 'clipboard', {value: {
  writeText: async (text) => { seen.copied = text; }}});
"""


@dataclass
class Page:
    """The page in the browser."""

    driver: webdriver.Chrome

    def open(self, url: str, model: str = "demo") -> None:
        """Open the page, record what it shows, and wait until it knows the models."""
        self.driver.get(url)
        self.driver.execute_script(RECORDER)
        if model:
            self.wait(lambda: self["model"].get_attribute("value") == model)

    def __getitem__(self, id: str) -> WebElement:
        return self.driver.find_element(By.ID, id)

    def wait(self, condition: Any, seconds: float = SECONDS) -> Any:
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def fill(self, **values: object) -> None:
        for id, value in values.items():
            self[id].clear()
            self[id].send_keys(str(value))

    def generate(self, **values: object) -> None:
        self.fill(**values)
        self["generate"].click()

    def finished(self) -> str:
        """The URL of the picture, once a request has finished."""
        self.wait(lambda: self["result"].is_displayed() or self["errors"].text)
        assert not self["errors"].text
        return self["picture"].get_attribute("src") or ""

    def seen(self, name: str) -> Any:
        return self.driver.execute_script(f"return seen.{name}")

    @contextmanager
    def emulated(self, *, dark: bool, width: int, height: int) -> Iterator[None]:
        """A screen of that size in CSS pixels, of a phone if it is narrow."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_async_script(
            f"const done = arguments[arguments.length - 1]; (async () => {{{code}}})()"
            ".then(done, (error) => done(String(error)))",
            *arguments,
        )


@pytest.fixture(scope="package")
def page() -> Iterator[Page]:
    """A browser with an empty profile."""
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",  # Tests may run as root.
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
        f"--host-resolver-rules=MAP {EVIL} 127.0.0.1",
    ):
        options.add_argument(flag)
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    options.binary_location = found
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        yield Page(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="package")
def url() -> Iterator[str]:
    """The URL of a server that runs one job at a time, a batch each ``BATCH_SECONDS``.

    Its model takes images and adapters.
    """
    flags = ("--http-port", "0", "--max-resident-samples", "1")
    with start(*flags, pass_seconds=BATCH_SECONDS, images=True) as server:
        yield f"http://{server.until('serving')['http']}"
