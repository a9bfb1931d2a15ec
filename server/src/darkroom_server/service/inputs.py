"""The images of a request, from the bytes or the uploads that it names, into its job."""

from collections.abc import Mapping
from dataclasses import replace

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import InvalidRequest, UploadNotFound, Violation
from darkroom_server.core.inputs import Control, InputImage
from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import counted_as
from darkroom_server.service.input_fields import sources_of
from darkroom_server.service.request import GenerationRequest, ImageSource, Inputs
from darkroom_server.uploads.decoder_pool import Decoded, DecoderPool, Fit
from darkroom_server.uploads.fit import Bounds, edit_size
from darkroom_server.uploads.store import UploadStore

MAX_REFERENCE_RATIO = 8
"""Of the sides of a reference image. Pipelines fail on more, each from another number on."""


class InputLoader:
    """Finds and decodes the images of requests."""

    def __init__(self, store: UploadStore, decoder: DecoderPool) -> None:
        self._store = store
        self._decoder = decoder

    def files(self, request: GenerationRequest, caller: Caller) -> dict[str, bytes]:
        """The file of each picture of ``request`` by digest, from the request or an upload.

        Raises ``UploadNotFound`` with all that are missing.
        """
        files, missing, owner = {}, [], counted_as(caller)
        for _, source in sources_of(request.inputs or Inputs()):
            data = source.data
            if data is None and (upload := self._store.get(owner, source.digest)) is not None:
                data = upload.data
            if data is not None:
                files[source.digest] = data
            elif source.digest not in missing:
                missing.append(source.digest)
        missing = [digest for digest in missing if digest not in files]
        if missing:
            raise UploadNotFound(missing)
        return files

    async def attach(
        self,
        job: Job,
        request: GenerationRequest,
        model: ModelInfo,
        caller: Caller,
        files: Mapping[str, bytes],
    ) -> Job:
        """``job`` with the images of ``request``, and with the size that follows from them.

        ``files``: that of each picture by digest. Raises ``InvalidRequest`` with all violations,
        ``QueueFull`` and ``GenerationFailed``.
        """
        inputs = request.inputs or Inputs()
        if not any(sources_of(inputs)):
            return job
        owner = counted_as(caller)
        loading = _Loading(self._decoder, owner, files, model)
        image, mask = None, None
        if inputs.image is not None:
            size = (request.width, request.height)
            decoded = await loading.covering("image", inputs.image, *size)
            if decoded is not None:
                job = replace(job, width=decoded.width, height=decoded.height)
                image = _input(inputs.image, decoded)
                mask = await loading.mask(inputs.mask_image, decoded)
        references = [
            await loading.reference(f"reference_images[{index}]", source)
            for index, source in enumerate(inputs.reference_images)
        ]
        if inputs.task is Task.EDIT and (first := references[0]) is not None:
            width, height = loading.edit_size(first, request)
            job = replace(job, width=width, height=height)
        adapter = None
        if inputs.ip_adapter_image is not None:
            adapter = await loading.within("ip_adapter_image", inputs.ip_adapter_image)
        controls = []
        for index, asked in enumerate(inputs.controls):
            if asked.image is not None:
                field = f"controls[{index}].image"
                found = await loading.covering(field, asked.image, job.width, job.height)
                if found is not None:
                    controls.append(
                        Control(
                            id=asked.id,
                            image=_input(asked.image, found),
                            scale=asked.scale,
                            start=asked.start,
                            end=asked.end,
                        )
                    )
        if loading.violations:
            raise InvalidRequest(loading.violations)
        return replace(
            job,
            image=image,
            mask_image=mask,
            reference_images=tuple(filter(None, references)),
            reference_pixels=model.reference_pixels(len(references)),
            ip_adapter_image=adapter,
            controls=tuple(controls),
        )


class _Loading:
    """Decodes the images of one request, and collects their violations."""

    def __init__(
        self, decoder: DecoderPool, owner: str, files: Mapping[str, bytes], model: ModelInfo
    ) -> None:
        limits = model.limits
        self._min_reference_side = limits.min_reference_side
        self._edit_area = model.defaults.width * model.defaults.height
        self.violations: list[Violation] = []
        self._decoder = decoder
        self._owner = owner
        self._files = files
        self._bounds = Bounds(
            least=limits.min_size,
            most=limits.max_size,
            multiple=limits.size_multiple,
            sizes=limits.sizes,
        )

    async def covering(
        self, field: str, source: ImageSource, width: int | None, height: int | None
    ) -> Decoded | None:
        """A picture that covers the job's size; None if it cannot be used."""
        fit = Fit(kind="cover", bounds=self._bounds, width=width, height=height)
        return await self._decode(field, source, fit)

    async def mask(self, source: ImageSource | None, image: Decoded) -> InputImage | None:
        """The mask of ``image``; None if there is none, or it cannot be used."""
        if source is None:
            return None
        fit = Fit(
            kind="cover",
            bounds=self._bounds,
            width=image.width,
            height=image.height,
            gray=True,
            expected=image.source,
        )
        decoded = await self._decode("mask_image", source, fit)
        return None if decoded is None else _input(source, decoded)

    async def within(self, field: str, source: ImageSource) -> InputImage | None:
        """A picture with its own size, as far as the model's limit; None if it cannot be used."""
        decoded = await self._decode(field, source, Fit(kind="within", bounds=self._bounds))
        return None if decoded is None else _input(source, decoded)

    async def reference(self, field: str, source: ImageSource) -> InputImage | None:
        """As ``within``, and its sides must be neither too short nor too different."""
        found = await self.within(field, source)
        if found is None:
            return None
        short, long = sorted((found.width, found.height))
        if short < self._min_reference_side:
            rule = f"must have sides of at least {self._min_reference_side} pixels"
        elif long > MAX_REFERENCE_RATIO * short:
            rule = f"must not be more than {MAX_REFERENCE_RATIO} times as long as wide"
        else:
            return found
        self.violations.append(Violation(field, f"{rule}, and is {found.width}×{found.height}"))
        return None

    def edit_size(self, first: InputImage, request: GenerationRequest) -> tuple[int, int]:
        """The width and height of an edit, whose first reference image is ``first``."""
        return edit_size(
            (first.width, first.height),
            request.width,
            request.height,
            self._edit_area,
            self._bounds,
        )

    async def _decode(self, field: str, source: ImageSource, fit: Fit) -> Decoded | None:
        try:
            return await self._decoder.decode(self._owner, field, self._files[source.digest], fit)
        except InvalidRequest as invalid:
            self.violations += invalid.violations
            return None


def _input(source: ImageSource, decoded: Decoded) -> InputImage:
    return InputImage(
        digest=source.digest,
        width=decoded.width,
        height=decoded.height,
        channels=decoded.channels,
        pixels=decoded.pixels,
    )
