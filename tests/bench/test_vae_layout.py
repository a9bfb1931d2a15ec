"""The benchmark of the VAE's memory layout."""

from dataclasses import replace

import torch

from bench.micro.vae_layout import BENCHMARK, LAYOUTS, in_turns, new_decoder, vaes
from bench.report.machine import model_source
from tests.bench.test_results import RESULTS


def test_both_layouts_decode_the_same_image_of_the_models_size() -> None:
    make, side, _ = vaes(model_source(None))["of the model"]
    images = {}
    with torch.inference_mode():
        for name, layout in LAYOUTS.items():
            vae = make().eval()
            images[name] = new_decoder(vae, torch.float32, layout, side)()
            weight = vae.decoder.conv_in.weight
            assert weight.is_contiguous(memory_format=layout)
    one, other = images.values()
    assert one.shape == (1, 3, 128, 128)
    assert float((one - other).norm() / one.norm()) < 1e-4


def test_decoders_take_turns() -> None:
    calls: list[str] = []

    def decoder(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(())

    rounds = in_turns({"a": lambda: decoder("a"), "b": lambda: decoder("b")}, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert [set(each) for each in rounds] == [{"a", "b"}] * 2


def test_the_section_has_the_ratio() -> None:
    decodes = [
        {
            "vae": "of the model",
            "dtype": "bfloat16",
            "rounds": [{"contiguous": 0.005, "channels last": 0.004}] * 3,
        }
    ]
    chosen = {"dtype": "bfloat16", "layout": "contiguous", "reason": "the CPU has avx512_bf16"}
    figures = {"decodes": decodes, "chosen": chosen}
    text = BENCHMARK.section(replace(RESULTS, figures=figures))
    assert "bfloat16 and contiguous: the CPU has avx512_bf16" in text, "results of before the rule"
    chosen["vae_layout"] = "channels last"
    text = BENCHMARK.section(replace(RESULTS, figures=figures))
    assert "contiguous, and its VAE channels last: the CPU has avx512_bf16" in text
    assert "| of the model, bfloat16 | 5.00 | 4.00 | 0.80 (0.80 to 0.80) | 3 |" in text
