"""The page, driven in a real browser."""

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.page.conftest import EVIL, Page
from tests.server.app.process import start
from tests.server.http.door import token_file
from tests.server.uploads.pictures import plain

pytestmark = pytest.mark.needs("chromium")

AXE = Path(__file__).parents[2] / "examples/node/node_modules/axe-core/axe.min.js"


def api(url: str, path: str, **fields: Any) -> Any:
    """The answer to a request without the page."""
    body = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def image_of(url: str, **fields: Any) -> str:
    image: str = api(url, "/v1/images/generations", **fields)["data"][0]["b64_json"]
    return image


def test_a_prompt_becomes_an_image_step_by_step(page: Page, url: str) -> None:
    page.open(url)
    page.generate(prompt="a star", steps=12, seed=2**53 + 1, width=72)
    picture = page.finished()
    expected = image_of(url, prompt="a star", steps=12, seed=2**53 + 1, width=72)
    assert picture == f"data:image/png;base64,{expected}"
    *previews, last = page.seen("pictures")
    assert last == {"src": picture, "alt": "a star"}
    assert len(previews) >= 2
    assert all(each["alt"].startswith("Preview after step") for each in previews)
    assert all(each["src"].startswith("data:image/jpeg") for each in previews)
    assert any(text.startswith("Step ") and "of 12" in text for text in page.seen("texts"))
    assert page["picture"].get_attribute("alt") == "a star"
    assert str(2**53 + 1) in page["facts"].text
    assert f'"seed": "{2**53 + 1}"' in (page["record"].get_attribute("textContent") or "")

    page["again"].click()
    assert page.finished() == picture
    page["variation"].click()
    page.wait(lambda: str(2**53 + 2) in page["facts"].text)
    other = image_of(url, prompt="a star", steps=12, seed=2**53 + 2, width=72)
    assert page.finished() == f"data:image/png;base64,{other}" != picture
    thumbnails = page["results"].find_elements("tag name", "button")
    assert len(thumbnails) == 3
    thumbnails[-1].click()
    page.wait(lambda: page["picture"].get_attribute("src") == picture)


def test_the_place_in_the_queue_and_the_strip(page: Page, url: str) -> None:
    page.open(url)
    ahead = threading.Thread(target=image_of, args=(url,), kwargs={"prompt": "x", "steps": 60})
    ahead.start()
    page.wait(lambda: api(url, "/v1/status")["running_jobs"] == 1)
    page.generate(prompt="a star", steps=2)
    page.wait(lambda: page["queue"].text.startswith("1 of"))
    assert page["rows"].text == "2 of 8 rows"
    page.finished()
    ahead.join()
    assert any("queue" in text for text in page.seen("texts"))
    assert page["state"].text == "ready"


def test_cancel(page: Page, url: str) -> None:
    page.open(url)
    cancelled = api(url, "/v1/status")["ended_jobs"]["cancelled"]
    page.generate(prompt="a star", steps=900)
    page.wait(lambda: "Step" in page["status"].text)
    page["cancel"].click()
    page.wait(lambda: page["status"].text == "Cancelled")
    page.wait(lambda: api(url, "/v1/status")["ended_jobs"]["cancelled"] == cancelled + 1)
    assert page["generate"].is_enabled()


def test_what_is_copied_runs(page: Page, url: str, tmp_path: Path) -> None:
    page.open(url)
    prompt = 'it\'s a "star" $HOME \\ `x`'
    page.generate(prompt=prompt, steps=2, seed=5)
    expected = base64.b64decode(page.finished().partition(",")[2])
    page["copy-python"].click()
    code = page.wait(lambda: page.seen("copied"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "image.png").read_bytes() == expected
    page["copy-curl"].click()
    command = page.wait(lambda: page.seen("copied") != code and page.seen("copied"))
    assert command.startswith("curl ")
    if shutil.which("curl"):
        shown = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
        image = json.loads(shown.stdout)["data"][0]
        assert base64.b64decode(image["b64_json"]) == expected
        assert image["record"]["request"]["prompt"] == prompt


def test_violations_are_shown_at_their_fields(page: Page, url: str) -> None:
    page.open(url)
    page.driver.execute_script("document.getElementById('prompt').value = 'é'.repeat(5000)")
    page["generate"].click()
    page.wait(lambda: "at most 8192 bytes" in page["errors"].text)
    assert page["prompt"].get_attribute("aria-invalid") == "true"
    page.generate(prompt="a star", steps=1)
    page.finished()
    assert page["prompt"].get_attribute("aria-invalid") is None


def test_by_keyboard_alone(page: Page, url: str) -> None:
    page.open(url)
    assert page.driver.switch_to.active_element == page["prompt"]
    page["prompt"].send_keys("a star")
    page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
    page.finished()
    reached = set()
    for _ in range(30):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.driver.switch_to.active_element.get_attribute("id"))
    assert {"model", "seed", "generate", "again", "copy-python", "download"} <= reached


def test_a_token_stays_in_memory(page: Page, tmp_path: Path) -> None:
    tokens = token_file(tmp_path, "alice")
    with start("--http-port", "0", "--tokens", tokens, pass_seconds=0.02) as server:
        url = f"http://{server.until('serving')['http']}"
        page.open(url, model="")
        page.wait(lambda: page["token"].is_displayed())
        page["token"].send_keys("alice-secret", Keys.TAB)
        page.wait(lambda: page["model"].get_attribute("value") == "demo")
        page.generate(prompt="a star", steps=2)
        page.finished()
        page["copy-curl"].click()
        assert "alice-secret" not in page.wait(lambda: page.seen("copied"))
        assert "alice" not in page.driver.current_url
        kept = "return [document.cookie, localStorage.length, sessionStorage.length]"
        assert page.driver.execute_script(kept) == ["", 0, 0]
        page.open(url, model="")
        page.wait(lambda: page["token"].is_displayed())


def test_a_server_that_restarts_in_the_middle(page: Page) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    with start("--http-port", port, pass_seconds=0.05) as server:
        server.until("serving")
        page.open(url)
        page.generate(prompt="a star", steps=100, seed=1)
        page.wait(lambda: "Step" in page["status"].text)
    page.wait(lambda: any("Connection lost" in text for text in page.seen("texts")))
    with start("--http-port", port, pass_seconds=0.01) as server:
        server.until("serving")
        picture = page.finished()
        expected = image_of(url, prompt="a star", steps=100, seed=1)
        assert picture == f"data:image/png;base64,{expected}"


@pytest.mark.needs("node")
def test_an_image_with_a_marked_mask(page: Page, url: str, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(plain())
    (tmp_path / "b.png").write_bytes(b"no picture")
    page.open(url)
    page["picture-input"].find_element("tag name", "summary").click()
    page["image"].send_keys(str(tmp_path / "b.png"))
    page.wait(lambda: "must be a PNG" in page["errors"].text)
    assert not page["image-options"].is_displayed()
    page["image"].send_keys(str(picture))
    page.wait(lambda: page["canvas"].get_attribute("width") == "96")
    assert not page["errors"].text
    page.driver.execute_script("arguments[0].scrollIntoView()", page["canvas"])
    page.fill(strength=0.8, loras="ink:0.5, grain")
    canvas = page["canvas"]
    side = canvas.size["width"]
    # One fast stroke: the browser reports its ends alone.
    actions = ActionChains(page.driver, duration=0).move_to_element_with_offset(canvas, 0, 0)
    actions.click_and_hold().move_by_offset(side // 3, 0).release().perform()
    marked = """
      const context = document.getElementById('canvas').getContext('2d');
      return [5, 56, 64, 72].map((x) => context.getImageData(x, 32, 1, 1).data[3] > 0);
    """
    assert page.driver.execute_script(marked) == [False, True, True, True]
    page.generate(prompt="a star", steps=10, seed=3)
    page.finished()
    request = json.loads(page["record"].get_attribute("textContent") or "")["request"]
    digest = f"sha256:{hashlib.sha256(picture.read_bytes()).hexdigest()}"
    assert digest in json.dumps(request["image"])
    assert request["mask_image"]
    assert request["loras"] == {"ink": 0.5, "grain": 1}
    check_with_axe(page)
    page.driver.execute_script("arguments[0].scrollIntoView()", page["remove-image"])
    page["clear-mask"].click()
    assert page.driver.execute_script(marked) == [False] * 4
    page["remove-image"].click()
    page.fill(loras="")
    page.generate(prompt="a star")
    page.finished()
    plain_request = json.loads(page["record"].get_attribute("textContent") or "")["request"]
    assert "image" not in plain_request
    result = base64.b64decode((page["picture"].get_attribute("src") or "").partition(",")[2])
    page["edit"].click()
    page.wait(lambda: page["easel"].is_displayed())
    page.generate(strength=0.5)
    page.finished()
    digest = f"sha256:{hashlib.sha256(result).hexdigest()}"
    page.wait(lambda: digest in (page["record"].get_attribute("textContent") or ""))


@pytest.mark.needs("node")
def test_axe_finds_no_serious_fault(page: Page, url: str) -> None:
    page.open(url)
    check_with_axe(page)
    with page.emulated(dark=True, width=390, height=800):
        page.open(url)
        page.generate(prompt="a star", steps=2)
        page.finished()
        dark = "return matchMedia('(prefers-color-scheme: dark)').matches"
        assert page.driver.execute_script(dark)
        check_with_axe(page)
        sizes = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        wanted, there = page.driver.execute_script(sizes)
        assert wanted <= there == 390


def check_with_axe(page: Page) -> None:
    page.driver.execute_script(AXE.read_text())
    found = page.script("return (await axe.run()).violations")
    assert isinstance(found, list), found
    serious = [each["id"] for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []
    # The check itself finds what it should.
    page.driver.execute_script("document.body.insertAdjacentHTML('beforeend', '<input id=bad>')")
    found = page.script("return (await axe.run('#bad')).violations")
    page.driver.execute_script("document.getElementById('bad').remove()")
    assert "label" in [each["id"] for each in found]


class Attacker(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>evil</title>")

    def log_message(self, *_: object) -> None: ...


ATTACK = """
const api = arguments[0] + '/v1/images/';
const json = JSON.stringify({prompt: 'evil'});
const form = new FormData();
form.append('prompt', 'evil');
form.append('image', new Blob([Uint8Array.from(arguments[1])]), 'a.png');
const results = [];
for (const [path, mode, body, type] of [
  ['generations', 'cors', json, 'application/json'],
  ['generations', 'no-cors', json, 'text/plain'],
  ['generations', 'no-cors', json, 'application/x-www-form-urlencoded'],
  ['edits', 'no-cors', form],
]) {
  try {
    const headers = type ? {'Content-Type': type} : {};
    results.push((await fetch(api + path, {method: 'POST', mode, body, headers})).type);
  } catch { results.push('blocked'); }
}
return results;
"""

SUBMIT = """
const form = document.createElement('form');
Object.assign(form, {method: 'POST', action: arguments[0] + '/v1/images/edits',
                     enctype: 'multipart/form-data'});
const data = new DataTransfer();
data.items.add(new File([Uint8Array.from(arguments[1])], 'a.png'));
const image = Object.assign(document.createElement('input'), {type: 'file', name: 'image'});
image.files = data.files;
const prompt = Object.assign(document.createElement('input'), {name: 'prompt', value: 'evil'});
form.append(image, prompt);
document.body.append(form);
form.submit();
"""


def test_a_foreign_page_generates_nothing(page: Page, url: str) -> None:
    picture = list(plain())
    before = api(url, "/v1/status")["accepted_jobs"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Attacker) as evil:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        page.driver.get(f"http://127.0.0.1:{evil.server_address[1]}/")
        assert page.driver.title == "evil"
        assert page.script(ATTACK, url, picture) == ["blocked"] * 4
        page.driver.execute_script(SUBMIT, url, picture)
        page.wait(lambda: "foreign_origin" in page.driver.page_source)
        assert api(url, "/v1/status")["accepted_jobs"] == before
        # The same requests of the server's own page are answered, so the attack would work.
        page.driver.get(url)
        assert page.script(ATTACK, url, picture) == ["basic"] * 4
        evil.shutdown()
    assert api(url, "/v1/status")["accepted_jobs"] == before + 2


def test_rebinding_reaches_nothing(page: Page, url: str) -> None:
    port = url.rpartition(":")[2]
    page.driver.get(f"http://{EVIL}:{port}/")
    assert "unknown_host" in page.driver.page_source
    before = api(url, "/v1/status")["accepted_jobs"]
    page.script(ATTACK, f"http://{EVIL}:{port}", list(plain()))
    assert api(url, "/v1/status")["accepted_jobs"] == before
