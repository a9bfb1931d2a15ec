"""One job of the fake server, run by its own thread."""

import math
import threading
import time
from collections.abc import Callable

from google.protobuf.duration_pb2 import Duration

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client._errors import Cancelled, DarkroomError, DeadlineExceeded
from darkroom_client._types.job import JobState
from darkroom_client._types.model import Model, ModelState
from darkroom_client._types.request import GenerationRequest
from darkroom_client._wire.requests import decode_request
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._models import fill_defaults
from darkroom_client.testing._pictures import (
    LOSSY,
    encode,
    generate_image,
    gradient,
    has_pillow,
)
from darkroom_client.testing._statuses import sent_as

CHUNK = 16 * 1024
PREVIEW_SIZE = 8
POLL_SECONDS = 0.01

Event = generation_pb2.GenerationEvent


class FakeJob:
    """A job of the fake server, with its ``request`` and ``state``.

    The state is RUNNING from the start, also while the job reports a place in the queue.
    ``steps_done`` counts the steps of all its images, including those before a crash. ``loaded``
    returns its model once that is in memory, and raises why it cannot be.
    """

    def __init__(
        self,
        sent: generation_pb2.GenerateRequest,
        model: Model,
        behaviour: Behaviour,
        changed: threading.Condition,
        *,
        preview: generation_pb2.PreviewOptions,
        time_limit: float | None,
        kept: bool,
        loaded: Callable[[], Model | None],
        load_error: DarkroomError | None = None,
    ) -> None:
        self.request: GenerationRequest = decode_request(sent)
        self.state = JobState.RUNNING
        self.steps_done = 0
        self.message = fill_defaults(sent, model)
        self.error: DarkroomError | None = None
        self.events: list[Event] = []
        self.images: list[generation_pb2.Image] = []
        self.waiters = 0
        self.drops = 0
        self.kept = kept
        self.forgotten = False
        self._sent = sent
        self._model = model
        self._behaviour = behaviour
        self._changed = changed
        self._preview = preview
        self._loaded = loaded
        self._load_error = load_error
        if model.state is ModelState.LOADING:
            self.events.append(Event(queued=generation_pb2.Queued(position=behaviour.queue)))
        self._accepted_at = time.monotonic_ns()
        self._ends_at = _end(time_limit)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def count(self) -> int:
        """The number of images."""
        return self.message.image_count

    def same_as(self, message: generation_pb2.GenerateRequest) -> bool:
        """Whether ``message`` is the same request; ``on_disconnect`` may differ."""
        same = generation_pb2.GenerateRequest()
        same.CopyFrom(message)
        same.on_disconnect = self._sent.on_disconnect
        return same == self._sent

    def __repr__(self) -> str:
        total = self.message.steps * self.count
        return (
            f"<FakeJob {self.message.request_id} {self.state}, {self.steps_done} of {total} "
            f"steps: {self.message.prompt!r}>"
        )

    def add_caller(self, *, time_limit: float | None, kept: bool) -> None:
        """Add a caller. The thread must hold the condition."""
        self._ends_at = max(self._ends_at, _end(time_limit))
        self.kept = self.kept or kept

    def start(self) -> None:
        """Start the job's thread; call it once."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def cancel(self) -> bool:
        """Cancel the job; false if it had ended. The thread must hold the condition."""
        if self.state is not JobState.RUNNING:
            return False
        self._end(JobState.CANCELLED, Cancelled("the generation was cancelled"))
        return True

    def accepted(self, server_id: str, *, joined: bool) -> generation_pb2.Accepted:
        """The first event for its callers."""
        return generation_pb2.Accepted(
            request_id=self.message.request_id,
            seeds=[(self.message.seed + index) % 2**63 for index in range(self.count)],
            queue_position=self._behaviour.queue,
            model=self.message.model,
            model_revision=self._model.revision,
            joined=joined,
            server_id=server_id,
        )

    def generation(self) -> generation_pb2.Generation:
        """Its state for callers that do not follow it. The thread must hold the condition."""
        position, state, error = None, self.state, self.error
        step = [0] * self.count
        for event in self.events:
            match event.WhichOneof("event"):
                case "queued":
                    position = event.queued.position
                case "started" | "restarted":
                    position, step = None, [0] * self.count
                case "progress":
                    step[event.progress.image_index] = event.progress.step
        if state is JobState.RUNNING and position is not None:
            state = JobState.QUEUED
        age = Duration()
        age.FromNanoseconds(time.monotonic_ns() - self._accepted_at)
        return generation_pb2.Generation(
            request_id=self.message.request_id,
            state=generation_pb2.GenerationState.Value(f"GENERATION_STATE_{state.name}"),
            model=self.message.model,
            image_count=self.count,
            finished_images=len(self.images),
            step=sum(step),
            steps=self.message.steps * self.count,
            queue_position=position if state is JobState.QUEUED else None,
            age=age,
            error_reason=(error.reason or sent_as(error)[1]) if error is not None else "",
            error_message=str(error) if error is not None else "",
        )

    def response(self) -> generation_pb2.GenerateResponse:
        """The result for its callers."""
        return generation_pb2.GenerateResponse(
            request_id=self.message.request_id,
            images=self.images,
            timings=_timings(),
            model=self.message.model,
            model_revision=self._model.revision,
        )

    def _run(self) -> None:
        behaviour = self._behaviour
        if self._load_error is not None:
            self._end(JobState.FAILED, self._load_error)
            return
        while not self._has_model():
            if not self._runs():
                return
            self._pause(POLL_SECONDS)
        for position in range(behaviour.queue, 0, -1):
            self._emit(Event(queued=generation_pb2.Queued(position=position)))
            self._pause(behaviour.step_seconds)
        while behaviour.hold is not None and self._runs() and not behaviour.hold.is_set():
            self._pause(POLL_SECONDS)
        if self._run_steps(crash_at=behaviour.crash_at_step):
            self._run_steps(crash_at=None)
        with self._changed:
            if self._runs():
                self._deliver()

    def _has_model(self) -> bool:
        """Whether its model is in memory; ends the job if that cannot be loaded."""
        with self._changed:
            try:
                found = self._loaded()
            except DarkroomError as error:
                self._end(JobState.FAILED, error)
                return False
            self._model = found or self._model
            return found is not None

    def _run_steps(self, crash_at: int | None) -> bool:
        """Run every step; true if the engine crashed meanwhile."""
        behaviour, steps = self._behaviour, self.message.steps
        self._emit(Event(started=generation_pb2.Started()))
        for step in range(1, steps + 1):
            self._pause(behaviour.step_seconds)
            with self._changed:
                if not self._runs():
                    return False
                self._step(step, steps)
                if step == crash_at:
                    self._emit(Event(restarted=generation_pb2.Restarted(crashes=1)))
                    return True
                if step == behaviour.drop_at_step:
                    self.drops += 1
                if step == behaviour.forget_at_step:
                    self.forgotten = True
                    self._end(JobState.CANCELLED, None)
                if behaviour.error is not None and step == behaviour.error_at_step:
                    self._end(JobState.FAILED, behaviour.error)
        return False

    def _step(self, step: int, steps: int) -> None:
        for index in range(self.count):
            self.steps_done += 1
            progress = generation_pb2.Progress(
                image_index=index,
                step=step,
                steps=steps,
                rows=self.count,
                step_time=Duration(nanos=int(self._behaviour.step_seconds * 1e9) % 10**9),
            )
            self._emit(Event(progress=progress))
            every = self._preview.every_steps
            if every and step % every == 0:
                self._emit(Event(preview=self._preview_of(index, step)))

    def _preview_of(self, index: int, step: int) -> generation_pb2.Preview:
        side, image_format = PREVIEW_SIZE, types_pb2.IMAGE_FORMAT_PNG
        if has_pillow():
            chosen = self._preview.format
            image_format = chosen if chosen in LOSSY else types_pb2.IMAGE_FORMAT_JPEG
        data = encode(gradient(self.message.seed + index, side, side), side, side, image_format)
        return generation_pb2.Preview(
            image_index=index, step=step, data=data, format=image_format, width=side, height=side
        )

    def _deliver(self) -> None:
        withheld = self._behaviour.withheld
        for index in range(self.count):
            image = generate_image(self.message, index, self._model)
            image.prompt_truncated = self._behaviour.prompt_truncated
            image.flagged = withheld
            if withheld:
                image.data = b""
            self.images.append(image)
            self._emit_image(index, image)
        reason = (
            generation_pb2.FINISH_REASON_WITHHELD
            if withheld
            else generation_pb2.FINISH_REASON_COMPLETED
        )
        finished = generation_pb2.Finished(
            reason=reason,
            timings=_timings(),
            model=self.message.model,
            model_revision=self._model.revision,
        )
        self._emit(Event(finished=finished))
        self._end(JobState.FINISHED, None)

    def _emit_image(self, index: int, image: generation_pb2.Image) -> None:
        head = generation_pb2.Image()
        head.CopyFrom(image)
        head.data = b""
        for offset in range(0, len(image.data) or 1, CHUNK):
            chunk = generation_pb2.ImageChunk(
                image_index=index,
                size=len(image.data),
                offset=offset,
                data=image.data[offset : offset + CHUNK],
            )
            if offset == 0:
                chunk.image.CopyFrom(head)
            self._emit(Event(image=chunk))

    def _emit(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._runs(), seconds)

    def _runs(self) -> bool:
        if time.monotonic() > self._ends_at and self.state is JobState.RUNNING:
            self._end(JobState.EXPIRED, DeadlineExceeded("the deadline passed"))
        return self.state is JobState.RUNNING

    def _end(self, state: JobState, error: DarkroomError | None) -> None:
        with self._changed:
            self.state, self.error = state, error
            self._changed.notify_all()


def _end(time_limit: float | None) -> float:
    return math.inf if time_limit is None else time.monotonic() + time_limit


def _timings() -> generation_pb2.Timings:
    brief = Duration(nanos=1_000_000)
    return generation_pb2.Timings(
        queue=brief,
        encode_prompt=brief,
        denoise=brief,
        decode=brief,
        encode_image=brief,
        total=Duration(nanos=5_000_000),
    )
