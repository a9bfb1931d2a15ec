"""(d) Triton Inference Server through nvidia-pytriton, with its dynamic batcher.

Its batcher ignores settings: within a batch, one call of ``pipe()`` for equal ones.
"""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor, TimeoutAction
from pytriton.triton import Triton, TritonConfig

from bench.peers.servers.config import READY, ServerConfig, from_wire
from bench.peers.servers.sd_pipeline import SdPipeline

MODEL = "demo"
"""The model's name in the URL."""


def main() -> None:
    """Serve until killed."""
    config = ServerConfig.of_command_line(__doc__)
    model = ThreadPoolExecutor(1)  # pytriton does not promise to use one thread.
    pipeline = model.submit(SdPipeline, config).result()

    @batch
    def infer(request: Any) -> dict[str, Any]:
        wanted = [from_wire(json.loads(text)) for text in request[:, 0]]
        images = model.submit(pipeline.generate, wanted).result()
        return {"image": np.array(images, dtype=object)[:, None]}

    listening = TritonConfig(
        http_address="127.0.0.1",
        http_port=config.port,
        allow_grpc=False,
        allow_metrics=False,
        exit_timeout_secs=2,
    )
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=round(config.batch_timeout * 1e6),
        default_queue_policy=QueuePolicy(
            timeout_action=TimeoutAction.REJECT, allow_timeout_override=True
        ),
    )
    with Triton(config=listening) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=infer,
            inputs=[Tensor(name="request", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=config.max_batch_images, batcher=batcher),
            strict=True,
        )
        triton.run()
        print(READY, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
