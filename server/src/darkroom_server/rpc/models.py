"""ModelService: which models the server holds, and what they take."""

from darkroom.v1 import model_pb2, model_pb2_grpc, server_pb2
from darkroom_server.core.model import OPTIONAL_FIELDS, Guidance, ModelInfo
from darkroom_server.dispatch import AdapterStatus, CatalogStatus, Dispatcher
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.enums import (
    FORMAT_TO_WIRE,
    KIND_TO_WIRE,
    SCHEDULER_TO_WIRE,
    SOURCE_TO_WIRE,
    STATE_TO_WIRE,
    TASK_TO_WIRE,
)
from darkroom_server.rpc.interceptors.receiving import FORWARDED_FOR
from darkroom_server.security.admin_policy import AdminPolicy
from darkroom_server.service.call_context import CURRENT_CALL


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Answers from what the engines reported; only calls that change what the server holds ask one.

    ``policy`` decides which callers may change what the server holds.
    """

    def __init__(self, dispatcher: Dispatcher, policy: AdminPolicy) -> None:
        self._dispatcher = dispatcher
        self._availability = dispatcher.availability
        self._adapters = dispatcher.adapters
        self._policy = policy

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """Every model, in the configured order."""
        await self._dispatcher.models.look_at_files()
        models = self._availability.models
        return model_pb2.ListModelsResponse(models=[self._message(id) for id in models])

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """One model; raises ``UnknownModel``."""
        await self._dispatcher.models.look_at_files()
        id = self._availability.resolve(request.model)
        return model_pb2.GetModelResponse(model=self._message(id))

    async def LoadModel(
        self, request: model_pb2.LoadModelRequest, context: Context
    ) -> model_pb2.LoadModelResponse:
        """Load a model; raises ``NotAllowed``, and what ``Dispatcher.load_model`` raises."""
        self._check_may_change(context)
        await self._dispatcher.load_model(request.model)
        return model_pb2.LoadModelResponse(model=self._message(request.model))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Unload a model; raises ``NotAllowed`` or ``UnknownModel``."""
        self._check_may_change(context)
        jobs = self._dispatcher.unload_model(request.model)
        return model_pb2.UnloadModelResponse(unfinished_jobs=jobs)

    async def PinModel(
        self, request: model_pb2.PinModelRequest, context: Context
    ) -> model_pb2.PinModelResponse:
        """Pin or unpin a model; raises ``NotAllowed``, and what ``LoadModel`` raises."""
        self._check_may_change(context)
        await self._dispatcher.pin_model(request.model, pinned=request.pinned)
        return model_pb2.PinModelResponse(model=self._message(request.model))

    async def ListAdapters(
        self, request: model_pb2.ListAdaptersRequest, context: Context
    ) -> model_pb2.ListAdaptersResponse:
        """The adapters that fit one model, or any; raises ``UnknownModel``."""
        id = ""
        if request.model:
            await self._dispatcher.models.find(request.model)
            id = self._availability.resolve(request.model)
        adapters = self._availability.adapters
        if id:
            adapters = [adapter for adapter in adapters if id in adapter.models]
        return model_pb2.ListAdaptersResponse(adapters=map(adapter_message, adapters))

    async def AddAdapter(
        self, request: model_pb2.AddAdapterRequest, context: Context
    ) -> model_pb2.AddAdapterResponse:
        """Offer an adapter; raises ``NotAllowed``, and what ``AdapterCatalog.add`` raises."""
        self._check_may_change(context)
        added = await self._adapters.add(request.id)
        return model_pb2.AddAdapterResponse(adapter=adapter_message(added))

    async def RemoveAdapter(
        self, request: model_pb2.RemoveAdapterRequest, context: Context
    ) -> model_pb2.RemoveAdapterResponse:
        """Offer an adapter no more; raises ``NotAllowed`` or ``UnknownAdapter``."""
        self._check_may_change(context)
        jobs = self._adapters.remove(request.id)
        return model_pb2.RemoveAdapterResponse(unfinished_jobs=jobs)

    def _message(self, id: str) -> model_pb2.Model:
        return model_message(id, self._availability.models[id], self._dispatcher.models.status(id))

    def _check_may_change(self, context: Context) -> None:
        metadata = context.invocation_metadata() or ()
        forwarded = any(name == FORWARDED_FOR for name, _ in metadata)
        self._policy.check(CURRENT_CALL.get().caller, forwarded=forwarded)


def adapter_message(adapter: AdapterStatus) -> model_pb2.Adapter:
    """``adapter`` as a message."""
    return model_pb2.Adapter(
        id=adapter.id,
        kind=KIND_TO_WIRE[adapter.kind],
        models=adapter.models,
        rank=adapter.rank,
        bytes=adapter.bytes,
        resident=adapter.resident,
        rejection=adapter.rejection,
    )


def model_message(id: str, info: ModelInfo | None, status: CatalogStatus) -> model_pb2.Model:
    """A model as a message; ``info`` is None if it is neither loaded nor described yet."""
    message = model_pb2.Model() if info is None else _described(info, ready=status.ready)
    message.id, message.files_changed = id, status.changed
    set_place(message, status)
    return message


def set_place(message: model_pb2.Model | server_pb2.ModelStatus, status: CatalogStatus) -> None:
    """Fill the fields of ``message`` that say where the model is."""
    message.ready = status.ready
    message.state = STATE_TO_WIRE[status.state]
    message.state_reason = status.reason
    message.weight_bytes = status.weight_bytes
    message.pinned = status.pinned
    if status.last_used is not None:
        message.last_used.FromMicroseconds(round(status.last_used * 1e6))
    if status.load is not None:
        message.load.CopyFrom(
            model_pb2.ModelLoad(
                fetched_bytes=status.load.fetched_bytes,
                fetch_bytes=status.load.fetch_bytes,
                remaining_seconds=status.load.remaining_seconds,
            )
        )


def _described(info: ModelInfo, *, ready: bool) -> model_pb2.Model:
    """What requests may ask of a model, and how it runs if it is ``ready``."""
    defaults, limits = info.defaults, info.limits
    takes = [name for name in OPTIONAL_FIELDS if name in info.optional_fields]
    return model_pb2.Model(
        revision=info.revision,
        kind=info.kind,
        defaults=model_pb2.ModelDefaults(
            width=defaults.width,
            height=defaults.height,
            steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
            scheduler=SCHEDULER_TO_WIRE[defaults.scheduler],
            format=FORMAT_TO_WIRE[defaults.format],
            quality=defaults.quality,
            true_cfg_scale=defaults.true_cfg_scale if "true_cfg_scale" in takes else None,
            max_sequence_length=defaults.max_sequence_length,
            strength=defaults.strength,
            inpaint_strength=defaults.inpaint_strength,
        ),
        limits=model_pb2.ModelLimits(
            min_size=limits.min_size,
            max_size=limits.max_size,
            size_multiple=limits.size_multiple,
            max_guidance_scale=limits.max_guidance_scale,
            max_image_count=limits.max_image_count,
            max_prompt_bytes=limits.max_prompt_bytes,
            prompt_tokens=limits.prompt_tokens,
            max_rows=limits.max_rows if ready else 0,
            row_limit_source=SOURCE_TO_WIRE[limits.row_limit_source]
            if ready
            else model_pb2.ROW_LIMIT_SOURCE_UNSPECIFIED,
            max_sequence_length=limits.max_sequence_length,
            max_reference_images=limits.max_reference_images,
            min_reference_side=limits.min_reference_side,
            max_loras=limits.max_loras,
            max_controls=limits.max_controls,
            sizes=[model_pb2.ImageSize(width=w, height=h) for w, h in limits.sizes],
        ),
        schedulers=[
            model_pb2.SchedulerOffer(
                scheduler=SCHEDULER_TO_WIRE[offer.name],
                min_steps=offer.min_steps,
                max_steps=offer.max_steps,
            )
            for offer in info.schedulers
        ],
        runtime=runtime_message(info) if ready else None,
        optional_fields=takes,
        guidance=_guidance_message(info.guidance),
        unbatched_reason=info.unbatched_reason,
        tasks=[TASK_TO_WIRE[task] for task in info.tasks],
    )


def _guidance_message(guidance: Guidance) -> model_pb2.Guidance:
    return model_pb2.Guidance(
        scale=guidance.scale or "",
        above=guidance.above,
        needs_negative=guidance.needs_negative,
        rows=guidance.rows,
        calls=guidance.calls,
    )


def runtime_message(info: ModelInfo) -> model_pb2.ModelRuntime:
    """How a model runs, as a message."""
    runtime = info.runtime
    return model_pb2.ModelRuntime(
        device=runtime.device,
        dtype=runtime.dtype,
        preset=runtime.preset,
        attention=runtime.attention,
        slice_size=runtime.slice_size,
        autocast=runtime.autocast,
        vae_tiling=runtime.vae_tiling,
        channels_last=runtime.channels_last,
        fp8_storage=runtime.fp8_storage,
        safety_checker=runtime.safety_checker,
        format_rule=runtime.format_rule,
        preset_rule=info.preset_rule,
        denoiser=runtime.denoiser,
        quantization=runtime.quantization,
        offload=runtime.offload,
        vae_channels_last=runtime.vae_channels_last,
    )
