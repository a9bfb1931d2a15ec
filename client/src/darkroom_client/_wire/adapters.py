"""Decode and encode the messages that describe adapters."""

from darkroom.v1 import model_pb2
from darkroom_client._types.adapter import Adapter, AdapterKind

_KINDS = {
    model_pb2.ADAPTER_KIND_LORA: AdapterKind.LORA,
    model_pb2.ADAPTER_KIND_CONTROLNET: AdapterKind.CONTROLNET,
}


def decode_adapter(adapter: model_pb2.Adapter) -> Adapter:
    """Decode an adapter."""
    return Adapter(
        id=adapter.id,
        kind=_KINDS.get(adapter.kind, AdapterKind.UNKNOWN),
        models=tuple(adapter.models),
        rank=adapter.rank,
        bytes=adapter.bytes,
        resident=adapter.resident,
        rejection=adapter.rejection,
    )


def encode_adapter(adapter: Adapter) -> model_pb2.Adapter:
    """Encode an adapter as the server sends it."""
    kinds = {kind: number for number, kind in _KINDS.items()}
    return model_pb2.Adapter(
        id=adapter.id,
        kind=kinds.get(adapter.kind, model_pb2.ADAPTER_KIND_UNSPECIFIED),
        models=adapter.models,
        rank=adapter.rank,
        bytes=adapter.bytes,
        resident=adapter.resident,
        rejection=adapter.rejection,
    )
