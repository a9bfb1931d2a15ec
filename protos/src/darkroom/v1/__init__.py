"""The generated messages and stubs of package ``darkroom.v1``."""
