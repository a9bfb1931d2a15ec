"""Fuzzes the server with invalid requests: `python -m tests.server.hostile.fuzz --inputs 100000`.

Half of the inputs are messages with random field values, at or beyond their bounds. The other half
are such messages with damaged bytes. Each must end with an answer or with an error that blames the
caller.
"""

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from darkroom.v1 import generation_pb2, model_pb2, server_pb2
from darkroom_server.logs import configure_logs
from darkroom_server.settings import Dispatch, Logs, Results
from tests.server.wire import Wire, serving

One = TypeVar("One")

AT_ONCE = 64
ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",  # An adapter: the server has no place that one may come from.
    "RESOURCE_EXHAUSTED",  # An image that does not fit.
    "DEADLINE_EXCEEDED",  # A time limit of nanoseconds.
    "CANCELLED",  # One input watches a job that another one cancels.
}
"""No input may end with any other status."""

WHOLE = (0, 1, -1, 2, 3, 63, 64, 65, 100, 101, 2048, 2049, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
REAL = (0.0, -0.0, 1.0, 1.5, -1.0, 30.0, 30.1, 1e-45, 3.4e38, float("inf"), float("nan"))
TEXTS = (
    "",
    "a",
    "demo",
    "a star",
    "[flagged]",
    "\0",
    "★" * 3,
    "x" * 65,
    "x" * 8193,
    "../../x",
    "a\n",
)

METHODS: dict[str, type[Message]] = {
    "GenerationService/Generate": generation_pb2.GenerateRequest,
    "GenerationService/GenerateStream": generation_pb2.GenerateStreamRequest,
    "GenerationService/SubmitGeneration": generation_pb2.SubmitGenerationRequest,
    "GenerationService/WatchGeneration": generation_pb2.WatchGenerationRequest,
    "GenerationService/CancelGeneration": generation_pb2.CancelGenerationRequest,
    "GenerationService/GetGeneration": generation_pb2.GetGenerationRequest,
    "GenerationService/ListGenerations": generation_pb2.ListGenerationsRequest,
    "GenerationService/EstimateGeneration": generation_pb2.EstimateGenerationRequest,
    "ModelService/GetModel": model_pb2.GetModelRequest,
    "ModelService/ListAdapters": model_pb2.ListAdaptersRequest,
    "ModelService/AddAdapter": model_pb2.AddAdapterRequest,
    "ModelService/RemoveAdapter": model_pb2.RemoveAdapterRequest,
    "ModelService/LoadModel": model_pb2.LoadModelRequest,
    "ModelService/UnloadModel": model_pb2.UnloadModelRequest,
    "ModelService/PinModel": model_pb2.PinModelRequest,
    "ServerService/GetStatus": server_pb2.GetStatusRequest,
}


@dataclass(frozen=True)
class Input:
    """One call: the method's name and the bytes of its message."""

    method: str
    message: bytes

    @property
    def streams(self) -> bool:
        """Whether the method answers with a stream."""
        return self.method.endswith(("GenerateStream", "WatchGeneration"))


def inputs(count: int, seed: int) -> Iterator[Input]:
    """Yield ``count`` inputs; the same seed gives the same inputs."""
    dice = random.Random(seed)
    names = list(METHODS)
    for number in range(count):
        method = dice.choice(names[:3]) if dice.random() < 0.7 else dice.choice(names)
        message = METHODS[method]()
        fill(message, dice, chance=dice.choice((0.1, 0.2, 0.4)))
        data = message.SerializeToString()
        yield Input(method, damaged(data, dice) if number % 2 else data)


def fill(message: Message, dice: random.Random, *, chance: float) -> None:
    """Set each field with probability ``chance`` to an unusual value; a prompt more often."""
    for field in message.DESCRIPTOR.fields:
        if dice.random() > (0.9 if field.name in ("generation", "prompt") else chance):
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.is_repeated:
            for _ in range(dice.randint(1, 3)):
                fill(getattr(message, field.name).add(), dice, chance=chance)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner: Message = getattr(message, field.name)
            inner.SetInParent()
            fill(inner, dice, chance=chance)
        elif field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, field.name, dice.randbytes(dice.choice((0, 1, 100, 10_000))))
        else:
            try:
                setattr(message, field.name, value_of(field, dice))
            except ValueError:
                continue  # Out of range for the type.


def value_of(field: Any, dice: random.Random) -> Any:
    """Return a value for ``field``, a descriptor."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return dice.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return dice.choice(REAL)
        case FieldDescriptor.CPPTYPE_ENUM:
            return dice.choice((0, 1, 2, 3, 99))
    return dice.choice(WHOLE) if dice.random() < 0.5 else dice.randrange(1, 100)


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Return ``data`` with bytes changed, inserted, removed, repeated or cut off."""
    broken = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(broken) + 1)
        match dice.randrange(4):
            case 0:
                broken[at : at + 1] = dice.randbytes(1)
            case 1:
                broken[at:at] = dice.randbytes(dice.randrange(1, 9))
            case 2:
                del broken[at : at + dice.randrange(1, 9)]
            case 3:
                broken += broken[at : at + 64]
    return bytes(broken)


async def fuzz(wire: Wire, count: int, seed: int) -> Counter[str]:
    """Send the inputs and count them by status; raises for a status that is not allowed."""
    return await statuses_of(inputs(count, seed), partial(send, wire), ALLOWED)


async def statuses_of(
    inputs: Iterator[One], send: Callable[[One], Awaitable[str]], allowed: Container[str]
) -> Counter[str]:
    """Send ``inputs`` by many callers and count them by status; raises for one not in ``allowed``.

    ``send`` returns the status of an input.
    """
    statuses: Counter[str] = Counter()

    async def caller() -> None:
        for one in inputs:  # All callers share it, so each input is sent once.
            status = await send(one)
            statuses[status] += 1
            assert status in allowed, f"{status} for {one!r:.4000}"

    async with asyncio.TaskGroup() as callers:
        for _ in range(AT_ONCE):
            callers.create_task(caller())
    return statuses


async def send(wire: Wire, one: Input) -> str:
    """Return the name of the status that an input ends with."""
    path = f"/darkroom.v1.{one.method}"
    channel: Any = wire.channel  # The stubs want a serializer, which bytes do not need.
    try:
        if one.streams:
            async for _ in channel.unary_stream(path)(one.message, timeout=60):
                pass
        else:
            await channel.unary_unary(path)(one.message, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def fuzzed() -> Any:
    """A server with enough room for all callers and little for results."""
    return serving(
        fake={"auto": True},
        dispatch=Dispatch(max_queued_jobs=4 * AT_ONCE),
        results=Results(result_ttl=1.0),
    )


async def run(count: int, seed: int) -> None:
    """Start a server, fuzz it, and print the counts."""
    async with fuzzed() as wire:
        statuses = await fuzz(wire, count, seed)
        assert (await wire.generate()).images
        assert wire.server.dispatcher.counts.live == 0
    for status, number in statuses.most_common():
        print(f"{number:9}  {status}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    configure_logs(Logs(log_level="warning"))
    asyncio.run(run(options.inputs, options.seed))
