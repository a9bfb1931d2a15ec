"""Triton's model repository: a folder for each model, which it loads on request."""

from collections.abc import Iterable
from pathlib import Path

MODULE = "from bench.trace.peers.triton_model import TritonPythonModel as TritonPythonModel\n"

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_images}
input [{{ name: "request" data_type: TYPE_STRING dims: [ 1 ] }}]
output [{{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
parameters {{ key: "device" value {{ string_value: "{device}" }} }}
"""
"""With the dynamic batcher, as in the other benchmark; ``device`` is the socket of ``Device``."""


def write_repository(
    folder: Path, names: Iterable[str], *, max_images: int, batch_timeout: float, device: str
) -> None:
    """Write models of these ``names`` into ``folder``; ``batch_timeout`` is in seconds."""
    for name in names:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(MODULE, encoding="utf-8")
        config = CONFIG.format(
            name=name, max_images=max_images, delay=round(batch_timeout * 1e6), device=device
        )
        (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
