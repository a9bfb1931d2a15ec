"""Implementations of the core.engine.Engine protocol: process, thread, fake."""
