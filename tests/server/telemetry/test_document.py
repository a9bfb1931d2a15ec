from pathlib import Path

from darkroom_server.telemetry.document import document

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_is_current() -> None:
    """Fix with `python -m darkroom_server.telemetry.document >docs/metrics.md`."""
    assert PAGE.read_text() == document()
