"""A model as Triton's Python backend runs it: it passes everything on to the ``Device``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from bench.trace.peers.triton_device import DeviceClient


class TritonPythonModel:
    """Triton creates it for a load, and ends it when the model is unloaded."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model; Triton waits for it."""
        self._name = args["model_name"]
        parameters = json.loads(args["model_config"])["parameters"]
        self._device = DeviceClient(parameters["device"]["string_value"])
        self._device("load", self._name)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to a batch of Triton's dynamic batcher."""
        texts = [triton.get_input_tensor_by_name(r, "request").as_numpy()[:, 0] for r in requests]
        rows = [text.decode() for each in texts for text in each]
        files = iter(self._device("generate", self._name, rows))
        responses = []
        for each in texts:
            images = np.array([next(files) for _ in each], dtype=object)[:, None]
            responses.append(triton.InferenceResponse([triton.Tensor("image", images)]))
        return responses

    def finalize(self) -> None:
        """Unload the model."""
        self._device("unload", self._name)
        self._device.close()
