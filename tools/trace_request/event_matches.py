"""Find where the serving side asks which kind an engine event is.

The engine, the pipe and the backends are not looked at: they make the events and hand them to the
dispatcher. Nor is ``serve --check``, which runs an engine without a dispatcher. A class that is
also a ``JobEvent`` (progress and previews reach the subscriptions as they are) is not counted:
after the router it is the job's event.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EVENTS = "darkroom_server.core.events"
BEFORE_THE_ROUTER = ("engine", "ipc", "backends", "preflight.py")


@dataclass(frozen=True, slots=True)
class Place:
    """A ``match`` statement or an ``isinstance`` call over classes of engine events."""

    file: str
    line: int
    how: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.how})"


def find_event_matches(package: Path) -> list[Place]:
    """Every place in ``package`` (the folder of ``darkroom_server``) that asks for a class."""
    kinds = union(package / "core" / "events.py", "Event")
    kinds -= union(package / "dispatch" / "jobs" / "events.py", "JobEvent")
    places = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        if file.parts[0] not in BEFORE_THE_ROUTER:
            places += [
                Place(str(file), line, how) for line, how in matches(path.read_text(), kinds)
            ]
    return places


def union(path: Path, name: str) -> set[str]:
    """The classes in the union that the module at ``path`` assigns to ``name``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
    raise ValueError(f"{path} has no union {name}")


def matches(source: str, kinds: set[str]) -> Iterator[tuple[int, str]]:
    """Line and statement of each test for one of ``kinds``, by whatever name it is imported."""
    tree = ast.parse(source)
    names = _names(tree, kinds)
    for node in ast.walk(tree):
        match node:
            case ast.Match(cases=cases):
                classes = [
                    each.cls
                    for case in cases
                    for each in ast.walk(case.pattern)
                    if isinstance(each, ast.MatchClass)
                ]
                if names & {ast.unparse(each) for each in classes}:
                    yield node.lineno, "match"
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, tested]):
                if names & {ast.unparse(each) for each in ast.walk(tested) if _is_name(each)}:
                    yield node.lineno, "isinstance"


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute)


def _names(tree: ast.Module, kinds: set[str]) -> set[str]:
    """How the module writes the event classes, which depends on its imports."""
    names = set()
    parent, _, module = EVENTS.rpartition(".")
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=source, names=aliases) if source == EVENTS:
                names |= {each.asname or each.name for each in aliases if each.name in kinds}
            case ast.ImportFrom(module=source, names=aliases) if source == parent:
                for each in aliases:
                    if each.name == module:
                        names |= {f"{each.asname or module}.{kind}" for kind in kinds}
            case ast.Import(names=aliases):
                for each in aliases:
                    if each.name == EVENTS:
                        names |= {f"{each.asname or EVENTS}.{kind}" for kind in kinds}
    return names
