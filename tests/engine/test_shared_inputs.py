"""Layers with the same input share the down product of their adapters."""

import pytest
import torch

from darkroom_server.engine.adapters import shared_inputs
from darkroom_server.engine.adapters.shared_inputs import SharedInputs

ROWS = 3
RANKS = {"q": 2, "k": 4, "v": 3, "out": 2}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of each product that is computed."""
    found: list[int] = []
    product = shared_inputs._product

    def count(x: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        found.append(across.shape[2])
        return product(x, across)

    monkeypatch.setattr(shared_inputs, "_product", count)
    return found


def test_layers_of_one_input_take_one_product(products: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    across = {n: torch.randn(ROWS, 5, rank, generator=generator) for n, rank in RANKS.items()}
    inputs = SharedInputs()

    def call(order: str) -> None:
        """One call of the module: ``order`` names its layers; ``out`` has an input of its own."""
        shared, own = torch.randn(2, ROWS, 2, 4, 5, generator=generator)
        for name in order.split():
            x = own if name == "out" else shared
            expected = x.reshape(ROWS, -1, 5) @ across[name]
            torch.testing.assert_close(inputs.down(name, x, across[name]), expected)

    call("q k v out")
    assert products == [2, 4, 3, 2]  # Each its own: which ones share is not known yet.
    for order in ("q k v out", "v out q k", "q q k v out", "q k out", "k v out"):
        products.clear()
        call(order)
        assert products.count(9) == (2 if order.startswith("q q") else 1), order
        assert set(products) == {9, 2}, order


def test_no_input_is_kept_after_the_last_layer() -> None:
    inputs = SharedInputs()
    across = torch.ones(1, 2, 1)
    for _ in range(2):
        x = torch.ones(1, 3, 2)
        for name in ("q", "k"):
            inputs.down(name, x, across)
    group = inputs._groups["q"]
    assert group is inputs._groups["k"]
    assert (group._input, group._parts, inputs._last_input) == (None, {}, None)
