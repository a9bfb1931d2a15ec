"""``python -m darkroom_server`` is ``darkroom-server``."""

from darkroom_server.cli import main

if __name__ == "__main__":
    main()
