"""One pass of the denoiser over the rows of some samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.failures import (
    DENOISER_FAILED,
    OUT_OF_MEMORY,
    is_fatal,
    is_out_of_memory,
)
from darkroom_server.engine.sample import Group, Sample

log = structlog.get_logger(__name__)

RECOVERY_PASSES = 1000
"""Passes that must go well until their lowered limit doubles: what took the memory may be gone.

Twice as many each time that it was not.
"""


@dataclass(slots=True)
class _Lowered:
    """A limit on rows, the passes that went well with it, and how many are to."""

    rows: int
    patience: int
    passes: int = 0


class Denoiser:
    """Packs samples into rows, calls the UNet once, and hands each sample its prediction.

    ``max_rows`` bounds every pass. Where one runs out of memory, those of its size are bounded
    further for a while, and only those: who asks for large images does not make small ones slow.
    """

    def __init__(
        self,
        unet: Any,
        *,
        max_rows: int,
        precision: Callable[[], AbstractContextManager[Any]],
        channels_last: bool = False,
    ) -> None:
        self.counts = Counts()
        self.unet = unet
        self.max_rows = max_rows
        self._lowered: dict[Group, _Lowered] = {}
        self._precision = precision
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def max_rows_of(self, group: Group) -> int:
        """Rows that a pass of ``group`` may have."""
        lowered = self._lowered.get(group)
        return min(self.max_rows, lowered.rows) if lowered else self.max_rows

    def predict(self, samples: Sequence[Sample]) -> list[torch.Tensor | Failure]:
        """The prediction for each sample, one row per embedding, or why there is none.

        A pass that fails is split and its halves are tried, down to single samples, so that only
        what fails alone fails. Raises what means that the device is lost.
        """
        try:
            predictions = self._forward(samples)
            self._went_well(samples[0].group)
            return list(predictions)
        except Exception as error:
            if is_fatal(error):
                raise
            out_of_memory = is_out_of_memory(error)
            log.warning(
                "pass failed",
                request_ids=sorted({sample.job.request_id for sample in samples}),
                samples=len(samples),
                rows=sum(sample.rows for sample in samples),
                out_of_memory=out_of_memory,
                why=str(error),
                exc_info=not out_of_memory,
            )
        # Outside the handler, whose traceback would keep the failed pass's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(samples) == 1:
            if not out_of_memory:
                return [DENOISER_FAILED]
            self.counts[Counted.OUT_OF_MEMORY_FAILED] += 1
            return [OUT_OF_MEMORY]
        half = len(samples) // 2
        if out_of_memory:
            self.counts[Counted.OUT_OF_MEMORY_SPLIT] += 1
            group, rows = samples[0].group, sum(sample.rows for sample in samples)
            max_rows = max(2, min(self.max_rows_of(group), rows // 2))
            before = self._lowered.get(group)
            patience = before.patience * 2 if before else RECOVERY_PASSES
            self._lowered[group] = _Lowered(max_rows, patience)
            log.warning("row limit lowered", group=str(group), max_rows=max_rows)
        return self.predict(samples[:half]) + self.predict(samples[half:])

    def _went_well(self, group: Group) -> None:
        lowered = self._lowered.get(group)
        if lowered is None or lowered.rows >= self.max_rows:
            return
        lowered.passes += 1
        if lowered.passes >= lowered.patience:
            lowered.rows, lowered.passes = min(lowered.rows * 2, self.max_rows), 0
            log.info("row limit raised", group=str(group), max_rows=lowered.rows)

    def _forward(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
        counts = [sample.rows for sample in samples]
        latents = torch.cat([s.denoiser_input().expand(s.rows, -1, -1, -1) for s in samples])
        context = torch.cat([e.hidden for s in samples for e in s.embeddings])
        timesteps = torch.stack([s.timestep.float() for s in samples for _ in range(s.rows)])
        with self._precision():
            predicted = self.unet(
                latents.contiguous(memory_format=self._layout),
                timesteps.to(latents.device),
                encoder_hidden_states=context,
                return_dict=False,
            )[0]
        return tuple(predicted.split(counts))
