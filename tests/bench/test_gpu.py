"""The logic of the GPU benchmark, on a CPU with a model of a few thousand weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bench.gpu.forward import FORMS, decode_seconds, encode_seconds, pass_seconds
from bench.gpu.report import BUSY, SATURATED, goals, section
from bench.report.results import Results
from tests.bench.test_results import RESULTS, run
from tests.engine.tiny import write_tiny_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )


@pytest.mark.parametrize("form", ["eager", "SDPA", "channels last"])
def test_a_form_runs_every_number_of_rows(pipeline: Any, form: str) -> None:
    seconds = pass_seconds(FORMS[form](pipeline.unet), (2, 4), repeats=2)
    assert list(seconds) == [2, 4]
    assert all(value > 0 for value in seconds.values())


def test_all_forms_give_the_same_output(pipeline: Any) -> None:
    outputs = []
    for form in ("eager", "SDPA", "channels last"):
        torch.manual_seed(0)
        outputs.append(FORMS[form](pipeline.unet)(2)()[0])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-4)


def test_row_counts_that_do_not_fit_are_omitted(pipeline: Any) -> None:
    def ready(rows: int) -> Any:
        if rows > 4:
            raise torch.OutOfMemoryError
        return lambda: None

    assert list(pass_seconds(ready, (2, 4, 8, 16), repeats=1)) == [2, 4]


def test_decodes_and_prompts_are_timed(pipeline: Any) -> None:
    assert decode_seconds(pipeline.vae, torch.randn(1, 4, 8, 8), repeats=2) > 0
    assert encode_seconds(pipeline.text_encoder, 2, repeats=2) > 0


def results() -> Results:
    lone = [{"engine": 0.5, "pipe": 1.0}, {"engine": 0.5, "pipe": 1.0}]
    return replace(
        RESULTS,
        bench="gpu",
        settings={"callers": 8, "load": 0.7},
        figures={
            "steps": [
                {"form": "eager", "rows": 2, "seconds": 0.020},
                {"form": "eager", "rows": 4, "seconds": 0.030},
                {"form": "SDPA", "rows": 2, "seconds": 0.010},
            ],
            "decode": [{"images": 1, "seconds": 0.040}],
            "encode": [{"prompts": 2, "seconds": 0.005}],
            "lone": {"20": lone, "50": lone},
        },
        runs=[
            run(scenario, peer, slowness)
            for scenario in (SATURATED, BUSY)
            for peer, slowness in (("serial", 0.4), ("static", 0.2), ("engine", 0.1))
        ],
    )


def test_the_section_has_shares_of_the_limit_and_omits_what_did_not_fit() -> None:
    page = section(results())
    assert "| eager | 20.0 (10%) | 30.0 (13%) |" in page
    assert "| SDPA | 10.0 (20%) |  |" in page
    assert "| 20 steps | 0.500 | 1.000 | 0.500 |" in page


def test_goals() -> None:
    reached = {goal.name: goal for goal in goals(results())}
    assert reached["a lone image of 50 steps, seconds"].met
    assert reached["p95 at 70 % load over static batches'"].reached == pytest.approx(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_bench_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.gpu.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["bench-gpu needs a CUDA device; there is none"]
    assert not list(tmp_path.iterdir())
