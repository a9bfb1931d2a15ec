"""A make-believe CUDA device on a CPU build of torch.

A tensor on it says that its device is ``cuda:0``; its values lie on the CPU, or on ``meta`` for
work of real size, of which only the shapes are computed. Autocast runs with CUDA's own lists of
operators. What mixes devices raises as CUDA does. Every copy between the host and the device, and
every wait of the host for the device, is counted with the line that caused it. Live bytes are
counted too, and an allocation beyond ``total_bytes`` raises what torch raises.

The device has no queue: all work is done when it is launched. float16 is computed in float32 and
rounded, because the CPU's own kernels of it are slow.
"""

import contextlib
import sys
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
META = torch.device("meta")

TOTAL_BYTES = 80 << 30

UUID = "00000000-0000-0000-0000-000000000000"

OURS = ("darkroom_server", "diffusers/", "transformers/", "compel/", "bench/", "tests/engine")
"""Parts of the paths of the code whose lines are reported; torch's own lines say little."""

HALF_KERNELS = frozenset(
    {
        "addmm",
        "baddbmm",
        "bmm",
        "conv2d",
        "conv3d",
        "convolution",
        "gelu",
        "group_norm",
        "layer_norm",
        "linear",
        "matmul",
        "mm",
        "native_group_norm",
        "native_layer_norm",
        "scaled_dot_product_attention",
        "silu",
        "softmax",
        "_softmax",
        "upsample_nearest2d",
    }
)
"""The operators whose float16 kernels are slow on a CPU, or not there."""

NO_CPU_SCALARS = frozenset({"addmm", "bmm", "cat", "conv2d", "embedding", "linear", "mm", "stack"})
"""Operators that take no scalar of the CPU beside tensors of CUDA, as most do."""

CONVERSIONS = frozenset({"to", "_to_copy", "copy_", "set_", "index_put_", "_index_put_impl_"})
"""Operators that take tensors of both devices."""

FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "view"})
"""Operators that launch no kernel, besides those whose result is a view of an input."""


class Kind(StrEnum):
    """What makes the host and the device wait for each other."""

    TO_DEVICE = "to device"
    TO_HOST = "to host"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class Traffic:
    """A copy between the host and the device, or a wait of the host.

    ``blocking``: the host waits until it is done. ``where`` is the line of ours that caused it.
    """

    kind: Kind
    operator: str
    blocking: bool
    where: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.operator}{'' if self.blocking else ', not waited for'}): " + (
            self.where
        )


class FakeDevice:
    """The state of the device; ``data_device`` is where values lie, the CPU or ``meta``.

    ``kernels`` counts launches by operator, ``dtypes`` operators by the dtypes of their tensors.
    torch has ``unused_bytes`` that any work can use, and ``unused_graph_bytes`` for graphs only.
    """

    def __init__(self) -> None:
        self.traffic: list[Traffic] = []
        self.kernels: Counter[str] = Counter()
        self.dtypes: Counter[tuple[str, tuple[torch.dtype, ...]]] = Counter()
        self.data_device = CPU
        self.total_bytes = TOTAL_BYTES
        self.emptied_caches = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.unused_bytes = 0
        self.unused_graph_bytes = 0
        self.on_operator: Callable[[str, tuple[torch.dtype, ...]], None] = lambda *_: None
        self._storages: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.recorded_events = 0
        self.awaited_events = 0
        self._pinned: list[weakref.ref[torch.Tensor]] = []

    @property
    def reserved_bytes(self) -> int:
        """What torch has of the device."""
        return self.live_bytes + self.unused_bytes + self.unused_graph_bytes

    def segments(self) -> list[dict[str, Any]]:
        """What torch has of the device, by pool."""
        usual = {"allocated_size": self.live_bytes, "total_size": self.live_bytes}
        usual["total_size"] += self.unused_bytes
        graphs = {"allocated_size": 0, "total_size": self.unused_graph_bytes}
        return [
            {"device": 0, "segment_pool_id": pool, **sizes}
            for pool, sizes in (((0, 0), usual), ((0, 1), graphs))
        ]

    def reset_counts(self) -> None:
        """Forget the traffic, the kernels and the dtypes; the memory stays as it is."""
        self.traffic.clear()
        self.kernels.clear()
        self.dtypes.clear()

    def note(self, kind: Kind, operator: str, *, blocking: bool = True) -> None:
        """Count a copy or a wait."""
        self.traffic.append(Traffic(kind, operator, blocking, _line()))
        if blocking and kind is not Kind.TO_DEVICE:
            self.awaited_events = self.recorded_events

    def blocking(self) -> Counter[Traffic]:
        """What the host waited for, and how often."""
        return Counter(each for each in self.traffic if each.blocking)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that ``tensor`` is in pinned memory."""
        self._pinned.append(weakref.ref(tensor))
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, or what it is a view of, is in pinned memory."""
        self._pinned = [each for each in self._pinned if each() is not None]
        storage = tensor.untyped_storage()._cdata
        alive = (each() for each in self._pinned)
        return any(each is not None and each.untyped_storage()._cdata == storage for each in alive)

    def allocate(self, tensor: "CudaTensor") -> None:
        """Count the memory of ``tensor`` until the last tensor with its storage is gone."""
        storage = tensor.data_elsewhere.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = storage.nbytes()
            if self.live_bytes + size > self.total_bytes:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self._sizes[key] = size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._storages[key] += 1
        weakref.finalize(tensor, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self._storages[key] -= 1
        if not self._storages[key]:
            del self._storages[key]
            self.live_bytes -= self._sizes.pop(key)


DEVICE = FakeDevice()
"""The device of this process: tensors cannot say which one they are on."""


class CudaTensor(torch.Tensor):
    """A tensor on ``cuda:0``; its values are those of ``data_elsewhere``."""

    data_elsewhere: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "CudaTensor":
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.data_elsewhere = data
        DEVICE.allocate(made)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.data_elsewhere!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    # The methods below need a device guard in C++, which a CPU build does not have.

    def __getitem__(self, index: Any) -> torch.Tensor:
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, torch.Tensor) and not isinstance(each, CudaTensor):
                DEVICE.note(Kind.TO_DEVICE, "index")
            elif isinstance(each, torch.Tensor) and each.dtype is torch.bool:
                DEVICE.note(Kind.SYNC, "index by a mask")
        DEVICE.kernels["index"] += isinstance(index, torch.Tensor | list)
        return CudaTensor(self.data_elsewhere[_mapped(_data, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor):
            DEVICE.note(Kind.TO_DEVICE, "setitem")
        DEVICE.kernels["copy_"] += 1
        self.data_elsewhere[_mapped(_data, index)] = _data(value)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied: torch.Tensor = _run(torch.ops.aten.copy_.default, (self, source, non_blocking), {})
        return copied

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
        if self.is_contiguous(memory_format=memory_format):
            return self
        DEVICE.kernels["contiguous"] += 1
        return CudaTensor(self.data_elsewhere.contiguous(memory_format=memory_format))

    def is_contiguous(self, memory_format: Any = torch.contiguous_format) -> bool:
        return self.data_elsewhere.is_contiguous(memory_format=memory_format)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_elsewhere.untyped_storage()

    def __invert__(self) -> torch.Tensor:
        DEVICE.kernels["bitwise_not"] += 1
        return CudaTensor(~self.data_elsewhere)

    def item(self) -> Any:
        DEVICE.note(Kind.SYNC, "item")
        return self.data_elsewhere.item()

    def tolist(self) -> Any:
        DEVICE.note(Kind.SYNC, "tolist")
        return self.data_elsewhere.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()


class CudaMode(TorchDispatchMode):
    """Sees what makes tensors on the device from none: factories, and copies to it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            return DEVICE.pin(func(*args, **{**kwargs, "pin_memory": False}))
        if any(isinstance(each, CudaTensor) or _is_cuda(each) for each in _leaves(args, kwargs)):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on the values of its tensors; the result is on the device if it should be."""
    name: str = func._overloadpacket.__name__
    if name == "_has_compatible_shallow_copy_type":
        return False
    flat = _leaves(args, kwargs)
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, CudaTensor)]
    target = next((each for each in flat if isinstance(each, torch.device)), None)
    if target is None and name == "to" and len(tensors) > 1:
        target = tensors[1].device
    on_device = bool(ours) if target is None else target.type == "cuda"
    _check_devices(name, args, tensors, ours)
    _note_traffic(name, args, kwargs, tensors, on_device)

    def where(each: Any) -> Any:
        return DEVICE.data_device if _is_cuda(each) else _data(each)

    given, options = _mapped(where, args), _mapped(where, kwargs)
    found = _compute(func, name, given, options)
    if on_device or ours:
        _count(name, ours, _leaves(given, options), found, func._schema.is_mutable)
    if not on_device:
        return found
    if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
        return args[0]
    wrapped = {id(each.data_elsewhere): each for each in ours}

    def wrap(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or isinstance(each, CudaTensor):
            return each
        known = wrapped.get(id(each))
        return CudaTensor(each) if known is None else known

    return _mapped(wrap, found)


def _check_devices(
    name: str, args: tuple[Any, ...], tensors: list[torch.Tensor], ours: list[CudaTensor]
) -> None:
    """Raise as CUDA does if the devices of ``tensors`` do not go together."""
    if not ours or name in CONVERSIONS:
        return
    others = [each for each in tensors if not isinstance(each, CudaTensor)]
    if name in ("index", "index_select") and not isinstance(args[0], CudaTensor):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    if name == "index":
        return
    if any(each.dim() or name in NO_CPU_SCALARS for each in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (when checking arguments of {name})"
        )


def _note_traffic(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[torch.Tensor],
    on_device: bool,
) -> None:
    if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero") and on_device:
        DEVICE.note(Kind.SYNC, name)
    if name == "index" and not all(isinstance(each, CudaTensor) for each in tensors):
        DEVICE.note(Kind.TO_DEVICE, name)
    if name not in ("to", "_to_copy", "copy_") or not tensors:
        return
    source = tensors[1] if name == "copy_" else tensors[0]
    if name == "copy_":
        on_device = isinstance(tensors[0], CudaTensor)
    if isinstance(source, CudaTensor) == on_device:
        return
    kind = Kind.TO_DEVICE if on_device else Kind.TO_HOST
    host = source if on_device else None
    if name == "copy_" and not on_device:
        host = tensors[0]
    non_blocking = kwargs.get("non_blocking", False) or _positional_non_blocking(name, args)
    pinned = host is not None and DEVICE.is_pinned(host)
    DEVICE.note(kind, name, blocking=not (non_blocking and pinned))


def _positional_non_blocking(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a copy is asked not to block: its first flag is ``non_blocking``."""
    return next((each for each in args if isinstance(each, bool)), False)


def _count(
    name: str, ours: list[CudaTensor], given: list[Any], found: Any, is_mutable: bool
) -> None:
    """Count the kernel of an operator; views and memory that is not written take none."""
    dtypes = tuple(dict.fromkeys(each.dtype for each in ours))
    DEVICE.dtypes[name, dtypes] += 1
    DEVICE.on_operator(name, dtypes)
    made = [each for each in _leaves(found) if isinstance(each, torch.Tensor)]
    before = {each.untyped_storage()._cdata for each in given if isinstance(each, torch.Tensor)}
    is_view = not is_mutable and all(each.untyped_storage()._cdata in before for each in made)
    if name in FREE or not made or is_view:
        return
    # cuDNN adds a bias in a kernel of its own; the statistics of a group take two.
    has_bias = name == "conv2d" and len(given) > 2 and isinstance(given[2], torch.Tensor)
    DEVICE.kernels[name] += 3 if name == "group_norm" else 1 + has_bias


def _compute(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name not in HALF_KERNELS or DEVICE.data_device is META:
        return func(*args, **kwargs)
    if all(_widened(each) is each for each in _leaves(args, kwargs)):
        return func(*args, **kwargs)
    return _mapped(_rounded, func(*_mapped(_widened, args), **_mapped(_widened, kwargs)))


def _leaves(*values: Any) -> list[Any]:
    """What is in ``values``: nested tuples, lists and dicts."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _leaves(*value)
        elif isinstance(value, dict):
            found += _leaves(*value.values())
        else:
            found.append(value)
    return found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each of its leaves changed; several times as fast as torch's own."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    return change(value)


def _widened(each: Any) -> Any:
    is_half = isinstance(each, torch.Tensor) and each.dtype is torch.float16
    return each.float() if is_half else each


def _rounded(each: Any) -> Any:
    is_single = isinstance(each, torch.Tensor) and each.dtype is torch.float32
    return each.half() if is_single else each


def _data(each: Any) -> Any:
    return each.data_elsewhere if isinstance(each, CudaTensor) else each


def _is_cuda(each: Any) -> bool:
    return isinstance(each, torch.device) and each.type == "cuda"


def _line() -> str:
    """The innermost line that is not torch's, such as ``engine/sample.py:12``."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and any(part in path for part in OURS):
            return f"{_short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _short(path: str) -> str:
    return path.rsplit("site-packages/", 1)[-1].rsplit("darkroom_server/", 1)[-1]


class FakeEvent:
    """An event in the queue of the device, which has done all work before it."""

    def __init__(self, **_: Any) -> None:
        self._recorded_at: float | None = None
        self.number = 0

    def record(self, *_: Any) -> None:
        """Record it in the queue."""
        self._recorded_at = time.perf_counter()
        DEVICE.recorded_events += 1
        self.number = DEVICE.recorded_events

    def query(self) -> bool:
        """Whether the host knows that the work before it is done, as it waited for later work."""
        return self.number <= DEVICE.awaited_events

    def synchronize(self) -> None:
        """Wait for the work before it."""
        assert self._recorded_at is not None, "the event was not recorded"
        awaited = max(DEVICE.awaited_events, self.number)
        DEVICE.note(Kind.SYNC, "event.synchronize")
        DEVICE.awaited_events = awaited

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds from this event to ``end``; CUDA raises before the work is done."""
        if not end.query():
            raise RuntimeError("CUDA error: device not ready")
        assert self._recorded_at is not None
        assert end._recorded_at is not None
        return (end._recorded_at - self._recorded_at) * 1000


@contextlib.contextmanager
def fake_cuda(*, total_bytes: int = TOTAL_BYTES, on_meta: bool = False) -> Iterator[FakeDevice]:
    """The device, while the context is entered, on this thread.

    In inference mode, as an engine: autograd needs more of CUDA than a CPU build has.
    """
    global DEVICE
    DEVICE = FakeDevice()
    DEVICE.total_bytes = total_bytes
    DEVICE.data_device = META if on_meta else CPU
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), CudaMode():  # type: ignore[no-untyped-call]
        _patch_torch(patch)
        yield DEVICE


def _patch_torch(patch: pytest.MonkeyPatch) -> None:
    torch._C._ensureCUDADeviceGuardSet()
    properties = types.SimpleNamespace(
        uuid=UUID, name="Fake GPU", major=9, minor=0, total_memory=DEVICE.total_bytes
    )

    def free_and_total(_: Any = None) -> tuple[int, int]:
        return DEVICE.total_bytes - DEVICE.reserved_bytes, DEVICE.total_bytes

    def reset_peak(_: Any = None) -> None:
        DEVICE.peak_bytes = DEVICE.live_bytes

    def empty_cache() -> None:
        DEVICE.emptied_caches += 1

    functions: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: DEVICE.note(Kind.SYNC, "cuda.synchronize"),
        "empty_cache": empty_cache,
        "mem_get_info": free_and_total,
        "memory_allocated": lambda _=None: DEVICE.live_bytes,
        "memory_reserved": lambda _=None: DEVICE.reserved_bytes,
        "memory_snapshot": lambda: DEVICE.segments(),
        "max_memory_allocated": lambda _=None: DEVICE.peak_bytes,
        "max_memory_reserved": lambda _=None: DEVICE.peak_bytes,
        "reset_peak_memory_stats": reset_peak,
        "get_device_properties": lambda _=None: properties,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_device_name": lambda _=None: properties.name,
        "get_device_capability": lambda _=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "Event": FakeEvent,
    }
    for name, value in functions.items():
        patch.setattr(torch.cuda, name, value)
    # A set that is made once, of functions as they are then.
    torch.utils._device._device_constructors()
    make_on_cpu = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made: torch.Tensor = make_on_cpu(data, **options)
        return made if device is None else made.to(device)

    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor, _=None: DEVICE.pin(tensor.clone()))
