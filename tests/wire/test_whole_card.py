"""The page that the project starts from, "Memory and speed" of diffusers 0.3.0, on one server.

Half precision, sliced attention and autocast: what its snippets generate on a make-believe CUDA
device, a caller gets byte for byte from a server on such a device with the default preset.
"""

import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from darkroom_client import Client, GenerationResult
from tests.engine.fake_cuda import fake_cuda
from tests.engine.tiny import SIZE, write_tiny_model

from .conftest import READY_SECONDS, LogReader

ROOT = Path(__file__).parents[2]
PROMPT = "a photo of an astronaut riding a horse on mars"
STEPS, SCALE, SEED = 5, 7.5, 23

SERVER = f"""
import sys
from darkroom_server.backends import process
from darkroom_server.cli import main
sys.path.insert(0, {str(ROOT)!r})
process.CHILD = ("-c", "import sys; sys.path.insert(0, {str(ROOT)!r}); "
                       "from tests.engine.fake_cuda_engine import run; run()")
main(sys.argv[1:])
"""


@dataclass
class Card:
    """What one server gave and logged."""

    result: GenerationResult
    runtime: Any
    metrics: str
    entries: list[dict[str, Any]] = field(default_factory=list)

    def entry(self, event: str) -> dict[str, Any]:
        """The last log line of ``event``: the one before may be of the first image's loop."""
        *_, found = (each for each in self.entries if each["event"] == event)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def card(folder: Path) -> Card:
    options = "--port 0 --metrics-port 0 --rows 4 --no-measurement-cache"
    command = [sys.executable, "-c", SERVER, "serve", *options.split(), "--model", f"tiny={folder}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        log = LogReader(server.stderr)
        try:
            log.located.wait(READY_SECONDS)
            if not log.address:
                pytest.fail(log.join())
            with Client(log.address, insecure=True) as client:
                client.wait_until_ready(READY_SECONDS)
                result = client.generate(
                    PROMPT, steps=STEPS, guidance_scale=SCALE, seed=SEED, exact=True
                )
                runtime = client.model().runtime
            started = [json.loads(line) for line in log.lines if line.startswith("{")]
            address = next(entry["metrics"] for entry in started if "metrics" in entry)
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
                metrics = reply.read().decode()
        finally:
            server.terminate()
            server.wait(60)
    entries = [json.loads(line) for line in log.join().splitlines() if line.startswith("{")]
    return Card(result, runtime, metrics, entries)


def snippets(folder: Path, *, autocast: bool = True) -> NDArray[np.uint8]:
    """The image of the page's snippets."""
    with fake_cuda():
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float16,  # ``torch_dtype`` in 0.3.0.
            safety_checker=None,
        )
        pipe.set_progress_bar_config(disable=True)
        pipe = pipe.to("cuda")
        pipe.enable_attention_slicing()
        with torch.autocast("cuda", enabled=autocast):
            image = pipe(
                PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                generator=torch.Generator("cpu").manual_seed(SEED),
            ).images[0]
    return np.asarray(image)


def test_the_image_is_that_of_the_snippets(card: Card, folder: Path) -> None:
    torch.set_num_threads(1)
    found = card.result.images[0].to_numpy()
    assert found.shape == (SIZE, SIZE, 3)
    assert (found == snippets(folder)).all()
    assert (found != snippets(folder, autocast=False)).any()


def test_a_caller_can_read_how_it_ran(card: Card) -> None:
    runtime = card.runtime
    assert (runtime.device, runtime.dtype, runtime.preset) == ("cuda:0", "float16", "frugal")
    assert (runtime.attention, runtime.slice_size, runtime.autocast) == ("sliced", "auto", True)
    record = card.result.images[0].replay
    assert (record.device, record.memory_fallbacks) == ("cuda:0", ())


def test_every_weight_is_half_and_every_attention_sliced(card: Card) -> None:
    seen = card.entry("what the device saw")
    assert seen["dtypes"] == ["torch.float16"]
    assert seen["devices"] == ["cuda:0"]
    assert len(seen["processors"]) > 4
    assert set(seen["processors"]) == {"SlicedAttnProcessor"}


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_autocast_is_in_force(card: Card, component: str) -> None:
    """Matrices are multiplied in half precision, and norms computed in single precision."""
    operators = card.entry("what the device saw")["operators"][component]
    for name in ("linear", "conv2d", "bmm", "baddbmm", "matmul", "scaled_dot_product_attention"):
        assert operators.get(name, ["float16"]) == ["float16"], name
    # Not softmax: its input stays in half precision, and autocast asks for its result in single.
    in_single = {"layer_norm", "group_norm"} & operators.keys()
    assert in_single
    for name in in_single:
        assert operators[name] == ["float32"], name


def test_prometheus_shows_the_memory_of_the_device(card: Card) -> None:
    for kind in ("allocated", "reserved", "peak", "device_used", "device_total"):
        series = f'darkroom_gpu_memory_bytes{{device="cuda:0",kind="{kind}"}}'
        (line,) = (line for line in card.metrics.splitlines() if line.startswith(series))
        assert float(line.split()[-1]) > 0


def test_the_log_says_what_preset_fast_would_gain(card: Card) -> None:
    gain = card.entry("preset fast would run a batch of two rows with less")
    assert 0 < gain["time_ratio"] < 1
    assert 0 < gain["memory_ratio"] <= 1
