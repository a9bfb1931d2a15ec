"""Tools for developers of Darkroom."""
