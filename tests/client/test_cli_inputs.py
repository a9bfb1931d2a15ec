"""Images and adapters on the command line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from darkroom_client import Control, UploadedImage, canny
from darkroom_client._types.model import OPTIONAL_FIELDS
from darkroom_client.cli import main
from darkroom_client.testing import FakeServer, fake_model
from tests.client.test_inputs import ADAPTERS, LARGE, OTHER, SMALL, digest

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    model = fake_model(optional_fields=OPTIONAL_FIELDS)
    with FakeServer(models=[model], adapters=ADAPTERS) as server:
        yield server


@pytest.fixture(autouse=True)
def here(tmp_path: Path, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_TARGET", fake.target)
    files = {"small": SMALL, "other": OTHER, "large": LARGE, "text": b"a text"}
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    return tmp_path


def test_every_flag_reaches_the_server(fake: FakeServer) -> None:
    flags = (
        "--image large.png --mask other.png --strength 0.5 --reference small.png "
        "--reference other.png --lora outline:0.8 --lora pastel --control pose:small.png "
        "--control edges:other.png:0.5 "
        "--ip-adapter-image small.png --ip-adapter-scale 0.25"
    )
    assert main(["generate", "a star", *flags.split()]) == 0
    (request,) = fake.requests
    assert request.image == UploadedImage(digest(LARGE))
    assert (request.mask_image, request.strength) == (OTHER, 0.5)
    assert request.reference_images == (SMALL, OTHER)
    assert request.loras == {"outline": 0.8, "pastel": 1.0}
    assert request.controls == (Control("pose", SMALL), Control("edges", OTHER, scale=0.5))
    assert (request.ip_adapter_image, request.ip_adapter_scale) == (SMALL, 0.25)
    assert main(["submit", "a star", "--image", "small.png"]) == 0
    assert main(["estimate", "a star", "--image", "small.png"]) == 0
    assert fake.requests[1].image == SMALL


def test_canny_sends_the_edges_of_an_image(fake: FakeServer) -> None:
    flags = "--control pose:small.png --canny edges:other.png:0.5"
    assert main(["generate", "a star", "a ring", *flags.split()]) == 0
    expected = (Control("pose", SMALL), Control("edges", canny(OTHER), scale=0.5))
    assert [request.controls for request in fake.requests] == [expected, expected]
    assert canny(OTHER) not in (OTHER, canny(SMALL))


def test_canny_names_its_extra(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert main(["generate", "a star", "--canny", "edges:large.png"]) == 2
    expected = "--canny needs Pillow and numpy: pip install 'darkroom-client[cli,numpy]'"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image none.png", "none.png"),
        ("--lora outline:much", "'outline:much' is not ID or ID:SCALE"),
        ("--lora a --lora a:0.5", "--lora: each adapter may be given once"),
        ("--control pose", "'pose' is not ID:FILE"),
        ("--control pose:none:0.5", "none"),
        ("--control pose:none:much", "none:much"),
        ("--control pose:small.png:3", "--control: must be 0 to 2, not 3"),
        ("--canny pose", "'pose' is not ID:FILE"),
        ("--canny edges:none.png", "none.png"),
        ("--canny edges:text.png", "--canny: text.png: image is not a PNG, JPEG or WebP file"),
        ("--mask small.png", "--mask: needs --image"),
        ("--lora a:9", "--lora: must be -4 to 4, not 9"),
    ],
)
def test_errors_name_the_flag(capsys: Capture, flags: str, message: str) -> None:
    try:
        code = main(["generate", "a star", *flags.split()])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code != 0
    assert message in capsys.readouterr().err


def test_a_replay_takes_the_images_again(fake: FakeServer, here: Path, capsys: Capture) -> None:
    assert main(["generate", "a star", "--seed", "7", "--image", "large.png"]) == 0
    fake.forget_uploads()
    with PIL.Image.open("a-star-7.png") as picture:
        assert picture.format == "PNG"
    assert main(["replay", "a-star-7.png"]) != 0
    assert "upload it again" in capsys.readouterr().err
    assert main(["replay", "a-star-7.png", "--input", "large.png"]) == 0
    assert "identical" in capsys.readouterr().out
