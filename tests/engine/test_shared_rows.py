"""Both rows of a guided image share the layers of a UNet before its prompts enter."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.engine_config import AdapterSource, Preset
from darkroom_server.core.events import BatchDone
from darkroom_server.core.inputs import Lora
from darkroom_server.engine.components.shared_rows import SharedRows

from .adapter_files import write_adapter
from .conftest import LoopUnderTest, config_for, make_job
from .fake_cuda import FakeDevice
from .test_graphs import generate


class Rows:
    """The rows of each call of a layer."""

    def __init__(self, unet: Any, name: str) -> None:
        self.seen: list[int] = []
        layer = unet.get_submodule(name)
        compute = layer.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(len(x))
            return compute(x, *args, **kwargs)

        layer.forward = forward


def unet_of(folder: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def inputs(unet: Any, rows: list[int]) -> dict[str, Any]:
    """A call in which each image has ``rows`` rows, with prompts of their own."""
    torch.manual_seed(0)
    side, total = unet.config.sample_size, sum(rows)
    counts = torch.tensor(rows)
    return {
        "sample": torch.randn(len(rows), 4, side, side).repeat_interleave(counts, 0),
        "timestep": torch.rand(len(rows)).mul(900).repeat_interleave(counts),
        "encoder_hidden_states": torch.randn(total, 7, unet.config.cross_attention_dim),
        "return_dict": False,
    }


def with_attention_first(folder: Path) -> Any:
    """A UNet like Stable Diffusion's, whose first block has attention."""
    config = dict(unet_of(folder).config)
    config["down_block_types"] = ("CrossAttnDownBlock2D", *config["down_block_types"][1:])
    config["up_block_types"] = (*config["up_block_types"][:-1], "CrossAttnUpBlock2D")
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel.from_config(config).eval()


@pytest.mark.parametrize("rows", [[2], [2, 2, 2], [1, 2, 1, 2]], ids=str)
@pytest.mark.parametrize("first_block", ["with attention", "without"])
@torch.inference_mode()
def test_a_call_gives_what_it_gives_with_all_rows(
    first_block: str, rows: list[int], tiny_folder: Path
) -> None:
    torch.set_num_threads(1)
    if first_block == "with attention":
        unet, attention = with_attention_first(tiny_folder), "down_blocks.0"
    else:
        unet, attention = unet_of(tiny_folder), "down_blocks.1"
        assert type(unet.down_blocks[0]).__name__ == "DownBlock2D"
    given = inputs(unet, rows)
    wanted = unet(**given)[0]
    to_q = f"{attention}.attentions.0.transformer_blocks.0.attn1.to_q"
    names = ("conv_in", "down_blocks.0.resnets.0.conv1", to_q)
    watched = [Rows(unet, name) for name in names]
    cross = Rows(unet, to_q.replace("attn1", "attn2"))
    shared = SharedRows(unet)
    with shared.sharing(rows):
        found = unet(**given)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert [each.seen for each in watched] == [[len(rows)]] * len(watched), "images, not rows"
    assert cross.seen == [sum(rows)]
    # The control: outside, and with rows that are not equal, nothing is shared.
    unet(**given)
    assert watched[0].seen == [len(rows), sum(rows)]
    given["sample"] = torch.randn_like(given["sample"])
    with shared.sharing([1] * sum(rows)):
        other = unet(**given)[0]
    assert watched[0].seen[-1] == sum(rows)
    assert not torch.allclose(other, wanted, atol=1e-2)


def test_other_kinds_of_unet_share_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    """SDXL's rows differ from the first layer on, by what is added to their timesteps."""
    unet = unet_of(write_sdxl(tmp_path))
    before = unet.conv_in.forward
    SharedRows(unet)
    assert unet.conv_in.forward == before
    usual = unet_of(tiny_folder)
    before = usual.conv_in.forward
    SharedRows(usual)
    assert usual.conv_in.forward != before, "the control"


def test_an_engine_shares_rows_except_of_exact_images_and_with_adapters(
    tmp_path: Path, tiny_folder: Path
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    file = write_adapter(tmp_path / "a.safetensors", pipeline)
    loop = LoopUnderTest(
        config_for(tiny_folder, adapters=(AdapterSource(id="a", location=str(file)),))
    )
    try:
        watched = Rows(loop.models["tiny"].unet, "down_blocks.0.resnets.0.conv1")
        loop.run(make_job("guided", steps=4))
        assert watched.seen == [1] * 4
        loop.run(make_job("unguided", steps=4, guidance_scale=1.0))
        assert watched.seen[4:] == [1] * 4
        loop.run(make_job("exact", steps=4, exact=True))
        assert watched.seen[8:] == [2] * 4
        loop.run(make_job("adapted", steps=4, loras=(Lora(id="a"),)))
        assert watched.seen[12:] == [2] * 4
        loop.run(make_job("several", steps=6, image_count=3))
        batches = [e.samples for e in loop.events if isinstance(e, BatchDone)]
        assert watched.seen[16:] == batches[16:]
        assert max(batches[16:]) == 3
        error = (loop.latents["exact", 0] - loop.latents["guided", 0]).abs().max()
        assert float(error) < 1e-3, "the same image"
    finally:
        loop.close()


def test_on_a_gpu_nothing_is_shared(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(SharedRows, "__init__", lambda *given: made.append(given))
    _, images = generate(tiny_folder, Preset.FAST, None, make_job("a", steps=2))
    assert images["a"]
    assert made == []
