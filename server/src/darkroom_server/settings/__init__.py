"""The server's settings: each declared once, set by flag, environment variable or file."""

from darkroom_server.settings.http import Http
from darkroom_server.settings.images import Images
from darkroom_server.settings.lifetime import Results, Shutdown
from darkroom_server.settings.logs import Logs
from darkroom_server.settings.models import Models
from darkroom_server.settings.network import Network, Security
from darkroom_server.settings.tree import (
    Dispatch,
    Engine,
    Settings,
    Storage,
)

__all__ = [
    "Dispatch",
    "Engine",
    "Http",
    "Images",
    "Logs",
    "Models",
    "Network",
    "Results",
    "Security",
    "Settings",
    "Shutdown",
    "Storage",
]
