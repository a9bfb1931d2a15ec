"""Images: atomic saves, and conversion for other libraries."""

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
from PIL import ImageShow

from darkroom_client import Image, ImageWithheld
from tests.client.scripted import SIZE, ScriptedServer, changed


@pytest.fixture
def image(client: Any) -> Image:
    """A PNG."""
    generated: Image = client.generate("a star", seed=7).images[0]
    return generated


def in_format(client: Any, image_format: str) -> Image:
    generated: Image = client.generate("a star", seed=7, format=image_format).images[0]
    return generated


@pytest.mark.parametrize(
    ("image_format", "names"),
    [
        ("png", ["a.png", "b.PNG"]),
        ("jpeg", ["a.jpg", "b.jpeg"]),
        ("webp", ["a.webp"]),
        ("raw_rgb", ["a.rgb", "b.raw"]),
    ],
)
def test_each_format_has_its_suffixes(
    client: Any, tmp_path: Path, image_format: str, names: list[str]
) -> None:
    image = in_format(client, image_format)

    for name in names:
        path = image.save(tmp_path / name)
        assert path == tmp_path / name
        assert path.read_bytes() == image.data
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("name", ["star.jpg", "star", "star.rgb", "star.png.txt"])
def test_a_suffix_of_another_format_is_an_error(image: Image, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"image in png: name it star"):
        image.save(tmp_path / name)

    assert os.listdir(tmp_path) == []


def test_a_file_is_never_replaced_silently(image: Image, tmp_path: Path) -> None:
    path = tmp_path / "star.png"
    path.write_text("precious")

    with pytest.raises(FileExistsError, match="overwrite=True"):
        image.save(path)
    assert path.read_text() == "precious"

    image.save(str(path), overwrite=True)
    assert path.read_bytes() == image.data
    assert os.listdir(tmp_path) == ["star.png"]


def test_a_file_that_appears_meanwhile_is_not_replaced(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "star.png"
    link = os.link

    def link_late(source: Any, target: Any) -> None:
        path.write_text("precious")
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)

    with pytest.raises(FileExistsError, match="overwrite=True"):
        image.save(path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["star.png"]


def test_a_file_system_without_hard_links(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    assert image.save(tmp_path / "star.png").read_bytes() == image.data
    assert os.listdir(tmp_path) == ["star.png"]


def test_a_file_gets_the_usual_permissions(image: Image, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")

    path = image.save(tmp_path / "star.png")

    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_missing_folder_is_an_error(image: Image, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        image.save(tmp_path / "none" / "star.png")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "raw_rgb"])
def test_pixels_in_pillow_and_numpy(client: Any, image_format: str) -> None:
    image = in_format(client, image_format)

    pil, array = image.to_pil(), image.to_numpy()

    assert (pil.mode, pil.size) == ("RGB", (SIZE, SIZE))
    assert array.dtype == numpy.dtype("uint8")
    assert array.shape == (SIZE, SIZE, 3)
    assert numpy.array_equal(numpy.asarray(pil), array)
    array[0, 0] = 0
    if image_format in ("png", "raw_rgb"):
        digest = hashlib.sha256(image.to_numpy().tobytes()).hexdigest()
        assert digest == image.replay.pixels_sha256


@pytest.mark.parametrize(
    ("library", "method", "extra"), [("PIL", "to_pil", "pil"), ("numpy", "to_numpy", "numpy")]
)
def test_a_missing_library_names_the_extra(
    image: Image, monkeypatch: pytest.MonkeyPatch, library: str, method: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ImportError, match=rf"pip install 'darkroom-client\[{extra}\]'"):
        getattr(image, method)()


def test_notebooks_show_a_picture_as_it_is_or_as_png(client: Any) -> None:
    png, jpeg, raw = (in_format(client, name) for name in ("png", "jpeg", "raw_rgb"))

    assert (png._repr_png_(), png._repr_jpeg_()) == (png.data, None)
    assert (jpeg._repr_png_(), jpeg._repr_jpeg_()) == (None, jpeg.data)
    assert raw._repr_jpeg_() is None
    with PIL.Image.open(io.BytesIO(raw._repr_png_() or b"")) as shown:
        assert (shown.format, shown.tobytes()) == ("PNG", raw.data)


def test_without_pillow_notebooks_show_no_raw_pixels(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = in_format(client, "raw_rgb")
    monkeypatch.setitem(sys.modules, "PIL", None)

    assert raw._repr_png_() is None


def test_a_result_of_one_image_is_shown_like_it(client: Any) -> None:
    for name in ("png", "jpeg"):
        one = client.generate("a star", format=name)
        assert one.image is one.images[0]
        assert (one._repr_png_(), one._repr_jpeg_()) == (
            one.image._repr_png_(),
            one.image._repr_jpeg_(),
        )
    several = client.generate("a star", image_count=2)
    assert (several._repr_png_(), several._repr_jpeg_()) == (None, None)
    with pytest.raises(ValueError, match=r"the result has 2 images: use result\.images"):
        several.image  # noqa: B018


def test_show_opens_each_image(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[PIL.Image.Image] = []

    class Viewer(ImageShow.Viewer):
        def show(self, image: PIL.Image.Image, **options: Any) -> int:
            shown.append(image)
            return 1

    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    result = client.generate("a star", image_count=2)

    result.show()
    result.images[0].show()

    pixels = [image.to_pil().tobytes() for image in result.images]
    assert [image.tobytes() for image in shown] == [*pixels, pixels[0]]


def test_repr_hides_the_pixels(image: Image) -> None:
    assert "data=" not in repr(image)
    assert "seed=7" in repr(image)


def test_a_withheld_image_has_no_pixels(
    client: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.append(changed(flagged=True, data=b""))
    image = client.generate("a star").images[0]

    assert image.flagged
    assert image._repr_png_() is None
    for use in (lambda: image.save(tmp_path / "star.png"), image.to_pil, image.to_numpy):
        with pytest.raises(ImageWithheld, match="withheld"):
            use()
    assert os.listdir(tmp_path) == []


def test_a_saved_png_is_a_png(image: Image, tmp_path: Path) -> None:
    with PIL.Image.open(image.save(tmp_path / "star.png")) as picture:
        assert (picture.format, picture.size) == ("PNG", (SIZE, SIZE))
