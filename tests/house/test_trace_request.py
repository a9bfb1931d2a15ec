"""The tracer counts calls between files, and finds where an event is matched."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools.trace_request.event_matches import matches, union
from tools.trace_request.tracer import Function, Tracer

CALLEE = """
def plain(): pass

async def coroutine():
    await suspend()
    await suspend()

class suspend:
    def __await__(self):
        yield
"""
CALLER = """
import traced_callee

def twice():
    traced_callee.plain()
    sorted([1], key=lambda _: own())
    traced_callee.plain()

def own(): pass

async def awaiting():
    await traced_callee.coroutine()
"""


@pytest.fixture
def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of two functions that call into another file."""
    loaded = {}
    for name, source in (("traced_callee", CALLEE), ("traced_caller", CALLER)):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    return loaded["traced_caller"]


def test_a_crossing_is_a_call_into_another_file(caller: ModuleType, tmp_path: Path) -> None:
    with Tracer({"ours": tmp_path}) as tracer:
        caller.twice()
        with tracer.recording():
            caller.twice()
        caller.twice()
    way = tracer.ways["ours"]
    plain = Function("traced_callee.py", "plain")
    assert way.crossings == {(Function("traced_caller.py", "twice"), plain): 2}
    assert way.files == ["traced_callee.py", "traced_caller.py"]
    assert way.functions[Function("traced_caller.py", "own")] == 1


def test_a_coroutine_counts_once_however_often_it_resumes(
    caller: ModuleType, tmp_path: Path
) -> None:
    with Tracer({"ours": tmp_path}) as tracer, tracer.recording():
        resumed = list(caller.awaiting().__await__())
    assert len(resumed) == 2
    coroutine = Function("traced_callee.py", "coroutine")
    assert tracer.ways["ours"].functions[coroutine] == 1
    assert tracer.ways["ours"].crossings.total() == 1


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("from darkroom_server.core.events import A\nmatch e:\n case A(): pass", "match"),
        ("from darkroom_server.core.events import A as X\nmatch e:\n case X() | 1: pass", "match"),
        ("from darkroom_server.core import events\nmatch e:\n case events.A(): pass", "match"),
        ("from darkroom_server.core.events import A, B\nisinstance(e, int | A)", "isinstance"),
        ("import darkroom_server.core.events as v\nisinstance(e, (v.A, int))", "isinstance"),
    ],
)
def test_a_test_for_an_event_is_found_by_whatever_name(statement: str, how: str) -> None:
    assert [found for _, found in matches(statement, {"A"})] == [how]


@pytest.mark.parametrize(
    "statement",
    [
        "from darkroom_server.core.events import B\nmatch e:\n case B(): pass",
        "from somewhere.events import A\nmatch e:\n case A(): pass",
        "from darkroom_server.core.events import A\nemit(A())",
    ],
)
def test_other_classes_and_other_uses_are_not_found(statement: str) -> None:
    assert list(matches(statement, {"A"})) == []


def test_a_union_that_is_gone_is_an_error(tmp_path: Path) -> None:
    module = tmp_path / "events.py"
    module.write_text("Event = A | B\n")
    assert union(module, "Event") == {"A", "B"}
    with pytest.raises(ValueError, match="no union Other"):
        union(module, "Other")
