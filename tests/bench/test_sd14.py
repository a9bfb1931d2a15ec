"""The real architecture, built on the meta device, has the published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.sd14 import TOKENS, new_text_encoder, new_tokenizer, new_unet, new_vae


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_sizes_are_those_of_stable_diffusion(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path)
    assert tokenizer.model_max_length == TOKENS
    with torch.device("meta"):
        assert parameters(new_unet()) == 859_520_964
        assert parameters(new_vae()) == 83_653_863
        assert parameters(new_text_encoder(tokenizer)) == 123_060_480


def test_a_prompt_fills_the_text_models_length(tmp_path: Path) -> None:
    batch = new_tokenizer(tmp_path)("a red star", padding="max_length", return_tensors="pt")
    assert batch.input_ids.shape == (1, TOKENS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_memory_bench_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.micro.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["memory", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["memory: needs a CUDA device; there is none"]
    assert not list(tmp_path.iterdir())
