from darkroom_client.testing.plugin import darkroom_server

__all__ = ["darkroom_server"]
