"""What is compiled: a denoiser without its weights, and what its arguments look like.

All of it is plain data, so a process of its own can compile it without the model's files, and
fine-tunes of one model share the result.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version

import torch

from darkroom_server.engine.forms.signature import Kinds
from darkroom_server.engine.warmup.formats import cpu_name

VERSION = 1
"""Of the way to compile; the results of another version are not used."""

LIBRARIES = ("diffusers", "torch")


@dataclass(frozen=True)
class CompileTask:
    """A denoiser to compile, on this machine and with this number of threads.

    ``description`` is what ``compile_process`` reads, as JSON. ``kinds`` are the arguments, of
    ``rows`` rows, None: of any number. ``gpu`` is the index of the GPU to compile on, None for a
    CPU; results are good for all of a kind.
    """

    description: str
    kinds: Kinds
    rows: int | None = None
    gpu: int | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Names the result: equal tasks on equal machines have equal ones."""
        where = {
            "version": VERSION,
            "device": cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        text = json.dumps(where, sort_keys=True) + self.description
        return hashlib.sha256(text.encode()).hexdigest()[:32]
