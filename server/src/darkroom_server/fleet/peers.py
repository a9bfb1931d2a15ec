"""Calls to the other servers of a ledger, over the gRPC of every caller; they go no further."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineExceeded,
    Failure,
    GenerationFailed,
    JobCancelled,
    NotReady,
    Reason,
    UnknownRequest,
)
from darkroom_server.core.events import PreviewReady, Replay, SampleProgress, StageSeconds
from darkroom_server.core.finished_image import RelayedImage
from darkroom_server.core.ledger import Key, ServerEntry
from darkroom_server.dispatch import JobEvent, Queued, Restarted, Started
from darkroom_server.rpc.enums import FORMAT_FROM_WIRE
from darkroom_server.rpc.errors import DOMAIN
from darkroom_server.rpc.interceptors.call_context import GENERATION, RELAYED_KEY
from darkroom_server.rpc.jobs import generation_of
from darkroom_server.security.fleet_tokens import fleet_token
from darkroom_server.service.jobs import MAX_PAGE_SIZE, Generation

CONTROL_SECONDS = 5.0
"""For a call that only asks or cancels."""

MAX_MESSAGE_BYTES = 4 * 1024**2

RETRY_SECONDS = 0.2

MAYBE_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)
"""Statuses that may mean that the job has moved: the ledger says where to."""

WATCH = f"/{GENERATION}/WatchGeneration"

Watched = generation_pb2.WatchGenerationResponse

Credentials = Callable[[ServerEntry], tuple[grpc.ChannelCredentials, str]]


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """A finished image; ``runtime``: fields of the ``ModelRuntime`` that made it."""

    index: int
    image: RelayedImage
    runtime: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """The job ended; ``error``: without its images."""

    stages: StageSeconds
    error: DarkroomError | None = None


RemoteEvent = JobEvent | RemoteImage | Ended


class PeerObserver(Protocol):
    """Receives each relayed call, on the event loop; no method blocks or raises."""

    def call_relayed(self, method: str) -> None:
        """A call goes to another server."""


class Peers:
    """Channels to other servers: streams on one, calls that must not wait behind them on another.

    ``credentials`` of a server with a certificate, and the name in it.
    """

    def __init__(self, observer: PeerObserver, credentials: Credentials) -> None:
        self._observer = observer
        self._credentials = credentials
        self._channels: dict[tuple[int, str, bool], grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close all channels."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    def keep(self, servers: Collection[int]) -> None:
        """Close the channels to all servers but these, also to those that do not answer."""
        for key in [key for key in self._channels if key[0] not in servers]:
            closing = asyncio.create_task(self._channels.pop(key).close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def watch(self, server: ServerEntry, key: Key) -> AsyncGenerator[RemoteEvent]:
        """What happens to a job at ``server``, from where it is; ends early if it is not there.

        Images stay in the messages in which they come. All else is small, and what of it a caller
        gets is this server's to say: the place in the queue, the previews that it asked for, the
        time since its own call.
        """
        self._observer.call_relayed("WatchGeneration")
        # Not the stub's, which gives no access to the bytes of a message.
        watch: Any = self._channel(server, control=False).unary_stream(
            WATCH,
            request_serializer=generation_pb2.WatchGenerationRequest.SerializeToString,
            response_deserializer=lambda message: (message, Watched.FromString(message).event),
        )
        call = watch(
            generation_pb2.WatchGenerationRequest(request_id=key.request_id),
            metadata=self._metadata(server, key),
        )
        begun: dict[int, list[bytes]] = {}
        try:
            async for message, event in call:
                if event.WhichOneof("event") == "image":
                    found: RemoteEvent | None = _image(message, event.image, begun)
                else:
                    found = _event(event)
                if found is not None:
                    yield found
        except grpc.aio.AioRpcError as error:
            if (ended := _ended(error)) is not None:
                yield ended
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # ``keep`` closed the channel.
        finally:
            call.cancel()

    async def cancel(self, server: ServerEntry, key: Key) -> bool:
        """As ``CancelGeneration`` there; raises ``UnknownRequest`` or ``NotReady``."""
        self._observer.call_relayed("CancelGeneration")
        call = self._stub(server).CancelGeneration(
            generation_pb2.CancelGenerationRequest(request_id=key.request_id),
            metadata=self._metadata(server, key),
            timeout=CONTROL_SECONDS,
        )
        response = await _answer(call, key)
        return bool(response.cancelled)

    async def generation(self, server: ServerEntry, key: Key) -> Generation:
        """As ``GetGeneration`` there; raises ``UnknownRequest`` or ``NotReady``."""
        self._observer.call_relayed("GetGeneration")
        call = self._stub(server).GetGeneration(
            generation_pb2.GetGenerationRequest(request_id=key.request_id),
            metadata=self._metadata(server, key),
            timeout=CONTROL_SECONDS,
        )
        return generation_of((await _answer(call, key)).generation)

    async def generations(self, server: ServerEntry, caller: str) -> dict[str, Generation]:
        """The newest jobs of a caller at ``server``, by request id; raises ``NotReady``."""
        self._observer.call_relayed("ListGenerations")
        call = self._stub(server).ListGenerations(
            generation_pb2.ListGenerationsRequest(page_size=MAX_PAGE_SIZE),
            metadata=self._metadata(server, Key(caller, "")),
            timeout=CONTROL_SECONDS,
        )
        found = (await _answer(call, Key(caller, ""))).generations
        return {each.request_id: generation_of(each) for each in found}

    def _metadata(self, server: ServerEntry, key: Key) -> tuple[tuple[str, str], ...]:
        token = fleet_token(server.key, key.caller)
        return (RELAYED_KEY, "1"), ("authorization", f"Bearer {token}")

    def _stub(self, server: ServerEntry) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self._channel(server, control=True))

    def _channel(self, server: ServerEntry, *, control: bool) -> grpc.aio.Channel:
        key = server.id, server.address, control
        if (channel := self._channels.get(key)) is None:
            # A pool of subchannels of its own, or both would share one connection.
            options: list[tuple[str, Any]] = [
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 5_000),
            ]
            if server.certificate:
                credentials, name = self._credentials(server)
                options.append(("grpc.ssl_target_name_override", name))
                channel = grpc.aio.secure_channel(server.address, credentials, options)
            else:
                channel = grpc.aio.insecure_channel(server.address, options)
            self._channels[key] = channel
        return channel


async def _answer(call: Any, key: Key) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise UnknownRequest(key.request_id) from None
        raise NotReady(
            f"the server that has {key.request_id!r} does not answer; try again in "
            f"{RETRY_SECONDS:g} s",
            Reason.DRAINING,
            RETRY_SECONDS,
        ) from None


def _ended(error: grpc.aio.AioRpcError) -> Ended | None:
    """The end of a job that a status reports; None if the job may be somewhere else."""
    if error.code() in MAYBE_ELSEWHERE and _reason(error) is not Reason.CANCELLED:
        return None
    reason = _reason(error) or Reason.INTERNAL
    message = error.details() or ""
    match reason:
        case Reason.CANCELLED:
            return Ended(StageSeconds(), JobCancelled(message))
        case Reason.DEADLINE_EXPIRED | Reason.DEADLINE_UNREACHABLE:
            return Ended(StageSeconds(), DeadlineExceeded(message))
    return Ended(StageSeconds(), GenerationFailed(Failure(reason, message)))


def _reason(error: grpc.aio.AioRpcError) -> Reason | None:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for packed in () if status is None else status.details:
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            return Reason(info.reason) if info.reason in Reason.__members__ else Reason.INTERNAL
    return None


def _event(event: Any) -> RemoteEvent | None:
    match event.WhichOneof("event"):
        case "queued":
            return Queued(event.queued.position)
        case "started":
            return Started()
        case "restarted":
            return Restarted(event.restarted.crashes)
        case "progress":
            it = event.progress
            return SampleProgress(
                job_id="",
                image_index=it.image_index,
                step=it.step,
                steps=it.steps,
                rows=it.rows,
                seconds=it.step_time.ToNanoseconds() / 1e9,
            )
        case "preview":
            it = event.preview
            return PreviewReady(
                job_id="",
                image_index=it.image_index,
                step=it.step,
                data=it.data,
                format=FORMAT_FROM_WIRE[it.format],
                width=it.width,
                height=it.height,
            )
        case "finished":
            return Ended(_stages(event.finished.timings))
    return None


def _image(message: bytes, chunk: Any, begun: dict[int, list[bytes]]) -> RemoteImage | None:
    """The image whose last chunk this is."""
    if chunk.offset == 0:
        begun[chunk.image_index] = []
    messages = begun[chunk.image_index]
    messages.append(message)
    remaining = chunk.size - chunk.offset
    # To read ``data`` copies it, which pays only if this may be the last chunk.
    if remaining > len(message) or remaining > len(chunk.data):
        return None
    del begun[chunk.image_index]
    image = Watched.FromString(messages[0]).event.image.image
    made = image.replay
    return RemoteImage(
        chunk.image_index,
        RelayedImage(
            messages=tuple(messages),
            decode=_joined,
            format=FORMAT_FROM_WIRE[image.format],
            width=image.width,
            height=image.height,
            seed=image.seed,
            prompt_truncated=image.prompt_truncated,
            flagged=image.flagged,
            replay=Replay(
                scheduler_class=made.scheduler_class,
                scheduler_config_json=made.scheduler_config_json,
                device=made.device,
                library_versions=dict(made.library_versions),
                rows_in_last_pass=made.rows_in_last_pass,
                pixels_sha256=made.pixels_sha256,
                memory_fallbacks=tuple(made.memory_fallbacks),
            ),
        ),
        {
            "dtype": made.dtype,
            "preset": made.preset,
            "channels_last": made.channels_last,
            "vae_channels_last": made.vae_channels_last
            if made.HasField("vae_channels_last")
            else made.channels_last,
            "quantization": made.quantization,
            "offload": made.offload,
        },
    )


def _joined(messages: Sequence[bytes]) -> bytes:
    """The file of an image in all of its chunks."""
    return b"".join(Watched.FromString(each).event.image.data for each in messages)


def _stages(timings: Any) -> StageSeconds:
    return StageSeconds(
        **{
            name: getattr(timings, name).ToNanoseconds() / 1e9
            for name in ("queue", "encode_prompt", "denoise", "decode", "encode_image")
        }
    )
