"""Finds the metrics that a PromQL expression names."""

import re

_STRINGS = re.compile(r'"[^"]*"')
_NAMES = re.compile(r"\b(?:darkroom|grpc_server)[:_][a-z0-9_:]+\b")
_SUFFIXES = re.compile(r"_(?:bucket|sum|count)$")


def named(expression: str) -> set[str]:
    """The names of our metrics and recording rules in ``expression``."""
    return set(_NAMES.findall(_STRINGS.sub("", expression)))


def family(name: str) -> str:
    """The metric that a series called ``name`` belongs to, if it is a histogram's."""
    return _SUFFIXES.sub("", name)
