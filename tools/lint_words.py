"""Find mannered words in prose: pages, docstrings, comments, strings, names and proto comments.

``words.toml`` holds the words, and what to write instead of each.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = Path(__file__).with_name("words.toml")
NOT_READ = (
    *("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi", "*package-lock.json"),
    *("tools/words.toml", "tests/house/test_lint_words.py", "*/demo_model/*"),
)
"""Generated files, and the files that hold the words themselves."""
WHOLE = (".md", ".toml", ".yml", ".yaml", ".txt", ".js", ".sh")
"""Files of which everything is read."""
NAMED = ("Makefile", "Dockerfile", ".ci/run", ".gitignore", ".dockerignore", ".editorconfig")
"""More of those, by name."""


SQL = re.compile(r"\bWHERE\b")
"""A keyword of a statement, not prose."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of prose that starts at ``line`` of its file."""

    line: int
    text: str


@dataclass(frozen=True)
class Word:
    """What is looked for; ``allow`` and ``paths`` are exceptions by wording and by file."""

    pattern: re.Pattern[str]
    instead: str
    allow: tuple[re.Pattern[str], ...] = ()
    paths: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls, pattern: str, instead: str, allow: Iterable[str] = (), paths: Iterable[str] = ()
    ) -> "Word":
        """Make a word from one table of ``words.toml``."""
        return cls(_compile(pattern), instead, tuple(map(_compile, allow)), tuple(paths))

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Every match in ``text`` that no exception covers."""
        allowed = [found.span() for each in self.allow for found in each.finditer(text)]
        for found in self.pattern.finditer(text):
            if SQL.search(found.group()):
                continue
            if not any(start <= found.start() and found.end() <= end for start, end in allowed):
                yield found


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One word in one file."""

    file: str
    line: int
    found: str
    instead: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.found!r}: write {self.instead}"


def load_words(path: Path = WORDS) -> list[Word]:
    """The words of the checked-in list."""
    tables: list[dict[str, Any]] = tomllib.loads(path.read_text())["words"]
    return [Word.parse(**table) for table in tables]


def check(file: str, source: str, words: Iterable[Word]) -> Iterator[Finding]:
    """Every word in ``source``, the content of ``file``, that should be another one."""
    words = [word for word in words if not any(fnmatch(file, path) for path in word.paths)]
    for text in prose(file, source):
        for word in words:
            for found in word.find(text.text):
                line = text.line + text.text.count("\n", 0, found.start())
                yield Finding(file, line, " ".join(found[0].split()), word.instead)


def prose(file: str, source: str) -> Iterator[Text]:
    """What of ``source`` people read."""
    if file.endswith(".py"):
        yield from _comments_of_python(source)
        yield from _strings_and_names(source)
    elif file.endswith(".proto"):
        yield from _blocks((n, line) for n, line in _numbered(source) if "//" in line)
    else:
        yield Text(1, source)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE)


def _numbered(source: str) -> Iterator[tuple[int, str]]:
    return enumerate(source.splitlines(), start=1)


def _comments_of_python(source: str) -> Iterator[Text]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from _blocks(
        (token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT
    )


def _blocks(comments: Iterable[tuple[int, str]]) -> Iterator[Text]:
    """Comments of consecutive lines as one text, since a phrase may be broken between lines."""
    first, lines = 0, list[str]()
    for number, comment in comments:
        if lines and number != first + len(lines):
            yield Text(first, "\n".join(lines))
            lines.clear()
        if not lines:
            first = number
        lines.append(re.sub(r"^.*?(#|//)+", "", comment))
    if lines:
        yield Text(first, "\n".join(lines))


def _strings_and_names(source: str) -> Iterator[Text]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text), lineno=line):
                yield Text(line, text)
            case (
                ast.FunctionDef(name=name, lineno=line)
                | ast.AsyncFunctionDef(name=name, lineno=line)
                | ast.ClassDef(name=name, lineno=line)
                | ast.arg(arg=name, lineno=line)
                | ast.Name(id=name, ctx=ast.Store(), lineno=line)
                | ast.Attribute(attr=name, ctx=ast.Store(), lineno=line)
            ):
                yield Text(line, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")))


def _files(given: list[str]) -> Iterator[str]:
    """Our files below the paths ``given``, or all of them; new ones that Git ignores are not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for file in sorted(set(listed.stdout.splitlines())):
        path = ROOT / file
        read = path.suffix in (".py", ".proto", *WHOLE) or file in NAMED
        ours = not any(fnmatch(file, pattern) for pattern in NOT_READ)
        if read and ours and path.exists():
            yield file


def main() -> None:
    """Print every finding, and their number by file; exit with 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files and folders; all of the project by default")
    parser.add_argument("--count", action="store_true", help="print only the number in each file")
    options = parser.parse_args()
    words = load_words()
    findings = [
        finding
        for file in _files(options.paths)
        for finding in sorted(check(file, (ROOT / file).read_text(), words))
    ]
    if not options.count:
        for finding in findings:
            print(finding)
    for file, count in Counter(finding.file for finding in findings).items():
        print(f"{count:5} {file}", file=sys.stderr)
    if findings:
        sys.exit(f"{len(findings):5} in all")


if __name__ == "__main__":
    main()
