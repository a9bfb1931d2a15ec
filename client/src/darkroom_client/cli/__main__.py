"""``python -m darkroom_client.cli``: the same as ``darkroom``."""

import sys

from darkroom_client.cli import main

sys.exit(main())
