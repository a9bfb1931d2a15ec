from pathlib import Path

from darkroom_server.settings.document import document

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    """Fix with `python -m darkroom_server.settings.document >docs/configuration.md`."""
    assert PAGE.read_text() == document()
