"""The page of models and cards: what is counted, and that the page has it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch

from bench.cards import counting, page
from bench.cards.models import ALIKE, MODELS, CardModel
from bench.cards.page import CARDS, GIB, WAYS, Counted, Part, count
from bench.report.markdown import DOCS
from darkroom_server.core.quantization import Quantization
from darkroom_server.engine.device.memory import SAFETY_MARGIN
from darkroom_server.engine.families.registry import FAMILIES

BY_NAME = {model.name: model for model in MODELS}
CHEAP = ("Stable Diffusion 1.5", "Sana 1.6B")
"""Models that are counted in seconds."""


@cache
def counted(name: str) -> Counted:
    return count(BY_NAME[name])


@pytest.mark.parametrize("name", CHEAP)
def test_the_page_is_what_the_command_makes(name: str) -> None:
    lines = (DOCS / "cards.md").read_text(encoding="utf-8").splitlines()
    made = page.sections([counted(name)])
    assert made.keys() == {"cards", "card_weights", "card_work", "card_batches"}
    for text in made.values():
        head, _, *rows = text.splitlines()
        assert head in lines
        assert rows
        assert set(rows) <= set(lines)


def test_every_model_has_its_rows() -> None:
    text = (DOCS / "cards.md").read_text(encoding="utf-8")
    for model in MODELS:
        assert text.count(f"| {model.name} | ") >= 2
        for name in model.components:
            assert f"| {model.name}: `{name}` | " in text


def test_every_family_is_on_the_page() -> None:
    assert {model.pipeline for model in MODELS} | ALIKE.keys() == FAMILIES.keys()
    assert set(ALIKE.values()) <= {model.pipeline for model in MODELS}


@pytest.mark.parametrize(
    ("name", "part", "parameters"),
    [
        ("Stable Diffusion 1.5", "unet", 859_520_964),
        ("Stable Diffusion 1.5", "vae", 83_653_863),
        ("Stable Diffusion 1.5", "text_encoder", 123_060_480),
    ],
)
def test_the_sizes_are_the_published_ones(name: str, part: str, parameters: int) -> None:
    module = counting.on_meta(BY_NAME[name].components[part])
    assert sum(each.numel() for each in module.parameters()) == parameters
    # Buffers are small.
    assert 2 * parameters <= counted(name).parts[part].plain < 2.001 * parameters


def test_a_batch_takes_what_the_make_believe_device_counts() -> None:
    """``test_unet_counts`` counts 130.1 MiB for two rows of the same UNet, by other means."""
    found = counted("Stable Diffusion 1.5")
    assert found.batch / (1 << 20) == pytest.approx(130.1, rel=0.03)
    assert found.row / (1 << 20) == pytest.approx(130.1 / 2, rel=0.05)


class Layers(torch.nn.Module):
    """A linear layer that all kinds pack, one whose sides only some kinds take, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.even = torch.nn.Linear(128, 64)
        self.odd = torch.nn.Linear(64, 24, bias=False)
        self.norm = torch.nn.LayerNorm(64)


def test_what_each_kind_packs() -> None:
    layers = counting.on_meta(Layers)
    even, odd, rest = 128 * 64, 64 * 24, 2 * (64 + 2 * 64)
    assert counting.weight_bytes(layers) == 2 * (even + odd) + rest
    assert counting.largest_layer(layers) == 2 * (even + 64)
    expected = {
        Quantization.INT8: even + odd + 2 * (64 + 24) + rest,
        Quantization.NF4: (even + odd) // 2 + (even + odd) // 16 + rest,
        Quantization.FP8_DYNAMIC: even + 4 * 64 + 2 * odd + rest,
    }
    assert {kind: counting.packed_bytes(layers, kind) for kind in expected} == expected


def test_live_bytes_are_those_that_something_uses() -> None:
    layer = counting.on_meta(lambda: torch.nn.Linear(16, 16, bias=False))
    given = torch.empty((4, 16), dtype=torch.bfloat16, device="meta")
    row = given.nbytes

    def chained() -> torch.Tensor:
        found: torch.Tensor = layer(layer(layer(given)))
        return found

    def kept() -> list[torch.Tensor]:
        return [layer(given) for _ in range(5)]

    assert counting.peak_bytes(layer, chained, [given]) == 2 * row, (
        "the layer's input and its output"
    )
    assert counting.peak_bytes(layer, kept, [given]) == 5 * row
    assert counting.peak_bytes(layer, lambda: given.view(2, 32), [given]) == 0
    assert counting.peak_bytes(layer, lambda: layer.weight.t()) == 0


def test_attention_is_one_kernel() -> None:
    layer = counting.on_meta(lambda: torch.nn.Linear(1, 1))
    given = torch.empty((1, 8, 4096, 64), dtype=torch.bfloat16, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    for call in (
        lambda: attend(given, given, given),
        lambda: attend(query=given, key=given, value=given),
    ):
        assert counting.peak_bytes(layer, call) == given.nbytes


def model(**parts: int) -> Counted:
    """A model whose components have that many GiB."""
    packed: Mapping[Quantization, int]
    made = {}
    for name, gib in parts.items():
        packed = {} if name == "vae" else {Quantization.NF4: gib * GIB // 4}
        made[name] = Part(plain=gib * GIB, packed=packed, largest=GIB // 8)
    return Counted(
        model=replace(BY_NAME["FLUX.1"], name="made up", rows=2),
        parts=made,
        batch=2 * GIB,
        row=GIB,
        decode=GIB // 2,
    )


def test_the_smallest_card_leaves_the_margin() -> None:
    small = model(transformer=12, text_encoder=4, vae=1)
    row = dict(zip(WAYS, page.cards_row(small)[1:], strict=True))
    assert row["16 bits"] == "19.00 → **24**"
    assert row["`nf4`"] == "7.00 → **8**"
    assert row["16 bits, `text-encoder`"] == "15.25 → **24**", "not 16: a tenth stays free"
    assert row["16 bits, `group`"] == "3.25 → **8**"
    large = page.cards_row(model(transformer=90, text_encoder=1, vae=1))
    assert large[1] == "94.00 → –"
    assert 19 * GIB <= 24 * GIB * (1 - SAFETY_MARGIN) < 22 * GIB


def test_the_images_of_a_batch() -> None:
    row = dict(
        zip(CARDS, page.batch_row(model(transformer=12, text_encoder=4, vae=1))[1:], strict=True)
    )
    assert row[16] == "–"
    # 21.6 GiB, of which 17 are weights: 4.6 are four rows, and so two images.
    assert row[24] == "2"
    assert row[48] == "13"
    assert row[80] == "27"
    small = model(transformer=1, vae=1)
    assert page.batch_row(replace(small, row=GIB // 8))[-1] == "32", "64 rows at most"


def test_a_model_that_is_not_counted_has_dashes() -> None:
    uncounted = replace(model(transformer=12, vae=1), batch=0, row=0)
    assert page.work_row(uncounted)[3:5] == ["–", "–"]
    assert page.batch_row(uncounted)[1:] == ["–"] * len(CARDS)
    assert isinstance(uncounted.model, CardModel)
