"""The pages that are committed say what the committed results say."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import (
    boundary_page,
    engine_page,
    estimates_page,
    exactness_page,
    lifecycle_page,
    metrics_cost_page,
    overload_page,
)
from bench.peers import page as peers_page
from bench.peers.plots import plot
from bench.results import RESULTS, Results, load, newest
from bench.sections import DOCS, replace_section

PAGES: dict[str, Callable[[Results], str]] = {
    "engine": lambda results: engine_page.page(results, "images"),
    "boundary": boundary_page.page,
    "lifecycle": lifecycle_page.page,
    "metrics-cost": metrics_cost_page.page,
    "overload": overload_page.page,
    "estimates": estimates_page.page,
    "exactness": exactness_page.page,
}
BENCHMARKS = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
REPRODUCIBILITY = (DOCS / "reproducibility.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", PAGES)
def test_a_section_is_what_the_newest_results_make(section: str) -> None:
    results = newest(section.replace("-", "_"))
    assert results is not None
    page = REPRODUCIBILITY if section == "exactness" else BENCHMARKS
    assert replace_section(page, section, PAGES[section](results)) == page


def test_the_peers_section_is_what_the_results_make_that_it_names(tmp_path: Path) -> None:
    section = BENCHMARKS.partition("<!-- bench:peers -->")[2].partition("<!-- /bench:peers -->")[0]
    every = [load(RESULTS / name) for name in re.findall(r"bench/results/(\S+\.json)", section)]
    assert every
    plots = [plot(results, tmp_path) for results in every]
    for file in (file for shown in plots for file, _ in shown):
        assert (DOCS / "images" / file).exists()
    made = peers_page.page(every, "images", plots)
    assert replace_section(BENCHMARKS, "peers", made) == BENCHMARKS
