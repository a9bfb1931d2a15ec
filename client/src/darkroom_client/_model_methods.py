"""The methods of both clients about the server's models and adapters."""

from collections.abc import Mapping

from darkroom_client._protocol.calls import Calls
from darkroom_client._transport.aio import AsyncTransport
from darkroom_client._transport.sync import SyncTransport
from darkroom_client._types.adapter import Adapter
from darkroom_client._types.model import Model


class ModelMethods:
    """The calls of ``ModelService`` for ``Client``."""

    _calls: Calls
    _transport: SyncTransport

    def models(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> list[Model]:
        """List the models of the server, in their configured order, each with its state."""
        return self._transport.run(self._calls.models(timeout, metadata))

    def model(
        self,
        id: str = "",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Describe the model ``id``, which may be empty if the server has a single model.

        Raises ``ModelNotFound`` for a name that the server does not have.
        """
        return self._transport.run(self._calls.model(id, timeout, metadata))

    def load_model(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Bring the model ``id`` into memory, and return it once it is there; for admins.

        A load may take minutes: the server goes on with it if ``timeout`` ends this call before.
        Raises ``ModelNotFound``, ``ModelUnusable``, ``ModelDoesNotFit`` and ``PermissionDenied``.
        """
        return self._transport.run(self._calls.load_model(id, timeout, metadata))

    def unload_model(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Unpin the model ``id``, and free its memory once its jobs have ended; for admins.

        Returns the number of unfinished jobs that still use it. The next request that names it
        loads it again. Raises ``ModelNotFound`` and ``PermissionDenied``.
        """
        return self._transport.run(self._calls.unload_model(id, timeout, metadata))

    def pin_model(
        self,
        id: str,
        *,
        pinned: bool = True,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Keep the model ``id`` in memory, or, with ``pinned=False``, no longer; for admins.

        A pinned model is loaded, and never makes room for another one. Raises what ``load_model``
        raises.
        """
        return self._transport.run(self._calls.pin_model(id, pinned, timeout, metadata))

    def adapters(
        self,
        model: str = "",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Adapter]:
        """List the adapters that fit ``model``, or any model, by id.

        Raises ``ModelNotFound`` for a model that the server does not have.
        """
        return self._transport.run(self._calls.adapters(model, timeout, metadata))

    def add_adapter(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Adapter:
        """Let requests name the adapter ``id``, and return it once they can; for admins.

        ``id``: the name of a file in the server's folder of adapters, without the ending, or of an
        adapter that was removed. One that is there already is returned as it is. Raises
        ``AdapterNotFound``, ``AdapterUnusable`` and ``PermissionDenied``.
        """
        return self._transport.run(self._calls.add_adapter(id, timeout, metadata))

    def remove_adapter(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Let no further request name the adapter ``id``; for admins.

        Returns the number of unfinished jobs that still use it, to their end. Raises
        ``AdapterNotFound`` and ``PermissionDenied``.
        """
        return self._transport.run(self._calls.remove_adapter(id, timeout, metadata))


class AsyncModelMethods:
    """The calls of ``ModelService`` for ``AsyncClient``."""

    _calls: Calls
    _transport: AsyncTransport

    async def models(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> list[Model]:
        """Like ``Client.models``."""
        return await self._transport.run(self._calls.models(timeout, metadata))

    async def model(
        self,
        id: str = "",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Like ``Client.model``."""
        return await self._transport.run(self._calls.model(id, timeout, metadata))

    async def load_model(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Like ``Client.load_model``."""
        return await self._transport.run(self._calls.load_model(id, timeout, metadata))

    async def unload_model(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Like ``Client.unload_model``."""
        return await self._transport.run(self._calls.unload_model(id, timeout, metadata))

    async def pin_model(
        self,
        id: str,
        *,
        pinned: bool = True,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """Like ``Client.pin_model``."""
        return await self._transport.run(self._calls.pin_model(id, pinned, timeout, metadata))

    async def adapters(
        self,
        model: str = "",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Adapter]:
        """Like ``Client.adapters``."""
        return await self._transport.run(self._calls.adapters(model, timeout, metadata))

    async def add_adapter(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Adapter:
        """Like ``Client.add_adapter``."""
        return await self._transport.run(self._calls.add_adapter(id, timeout, metadata))

    async def remove_adapter(
        self,
        id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Like ``Client.remove_adapter``."""
        return await self._transport.run(self._calls.remove_adapter(id, timeout, metadata))
