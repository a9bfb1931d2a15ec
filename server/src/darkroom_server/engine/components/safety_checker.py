"""The safety checker that a model's folder may contain."""

from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from PIL import Image

from darkroom_server.engine.failures import is_fatal

log = structlog.get_logger(__name__)


class SafetyChecker:
    """Flags images with a pipeline's own checker; called on the loop's thread."""

    def __init__(self, checker: Any, feature_extractor: Any) -> None:
        self._checker = checker
        self._feature_extractor = feature_extractor

    def flags(self, pixels: NDArray[np.uint8]) -> bool:
        """True if ``pixels`` [height, width, 3] must not be shown, or could not be checked.

        Raises an error that means that the device is lost.
        """
        try:
            return self._flags(pixels)
        except Exception as error:
            if is_fatal(error):
                raise
            log.exception("image could not be checked and is withheld")
            return True

    def _flags(self, pixels: NDArray[np.uint8]) -> bool:
        features = self._feature_extractor(Image.fromarray(pixels), return_tensors="pt")
        weights = next(self._checker.parameters())
        clip_input = features.pixel_values.to(weights.device, weights.dtype)
        # A copy: the checker blackens flagged images in place.
        unit = torch.from_numpy(pixels.astype(np.float32) / 255)[None].to(weights.device)
        _, flagged = self._checker(images=unit, clip_input=clip_input)
        return bool(flagged[0])
