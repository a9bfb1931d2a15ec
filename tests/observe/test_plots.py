"""The plots can be made from answers of Prometheus."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from bench.report.markdown import write_section
from tools.observe import __main__ as observe
from tools.observe.__main__ import section
from tools.observe.load import Received
from tools.observe.plots import STAGES, plot
from tools.observe.prometheus import Prometheus

ANSWERS: dict[str, Any] = {
    "sum by (stage) (darkroom_stage_seconds_sum)": {
        (("stage", stage),): seconds
        for stage, seconds in zip(STAGES, (4.0, 0.1, 9.0, 0.8, 0.05), strict=True)
    },
    "sum by (stage) (darkroom_stage_seconds_count)": {(("stage", s),): 10.0 for s in STAGES},
    "darkroom_model_memory_bytes": {
        (("component", name), ("model", "demo")): size
        for name, size in (("unet", 18e6), ("vae", 2e6), ("text_encoder", 4e5))
    },
    "darkroom_peak_memory_bytes": {
        (("model", "demo"), ("rows", rows), ("size_class", "64")): float(rows) * 2e6
        for rows in ("2", "4", "8")
    },
    "darkroom_decode_peak_memory_bytes": {(("model", "demo"), ("size_class", "64")): 3e6},
}


class Canned:
    """Answers in the form of Prometheus."""

    def query(self, expression: str) -> Any:
        return ANSWERS[expression]

    def over_time(self, expression: str, begin: float, end: float) -> Any:
        return {(): [(float(at), 0.5 + at / 100) for at in range(30)]}


def test_every_plot_is_written(tmp_path: Path) -> None:
    paths = plot(cast(Prometheus, Canned()), 0.0, 30.0, tmp_path)
    assert len(paths) == 3
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_the_page_shows_the_plots(tmp_path: Path) -> None:
    page = tmp_path / "operations.md"
    page.write_text("# Operations\n\n<!-- bench:observe -->\n<!-- /bench:observe -->\n\n## Logs\n")
    text = section("2026-01-01", "2 cores", 4, Received(images=9), [Path("observe-latency.png")])
    write_section("operations.md", "observe", text, tmp_path)
    written = page.read_text()
    assert "4 callers with mixed requests, 9 images" in written
    assert "![observe-latency](images/observe-latency.png)" in written
    assert written.endswith("<!-- /bench:observe -->\n\n## Logs\n")


def test_a_run_changes_the_docs_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, output = tmp_path / "docs", tmp_path / "observe-output"
    monkeypatch.setattr(observe, "DOCS", docs)
    monkeypatch.setattr(observe, "OUTPUT", output)
    monkeypatch.setattr(observe, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(observe, "print_rules", lambda scraped: None)
    monkeypatch.setattr(observe, "run_load", lambda *_, **options: Received(images=9))
    running = SimpleNamespace(address="", metrics="")
    monkeypatch.setattr(observe, "server", lambda: nullcontext(running))
    monkeypatch.setattr(observe, "prometheus", lambda *_, **options: nullcontext(Canned()))

    observe.main([])

    assert "](images/observe-memory.png)" in (output / "observe.md").read_text()
    assert (output / "images" / "observe-memory.png").exists()
    assert not docs.exists()

    observe.main(["--docs"])

    assert "9 images" in (docs / "operations.md").read_text()
    assert (docs / "images" / "observe-memory.png").exists()
