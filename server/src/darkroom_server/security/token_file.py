"""Parses the token file of ``--tokens``: TOML with one table per token."""

import re
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import StartupError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
KEYS = ("name", "sha256", "expires", "priority", "max_jobs", "jobs_per_minute", "admin")
MAX_PRIORITY = 8
"""Each level halves a job's patience. Eight levels below the others, a job of 8 steps lets them
pass for at most nine minutes."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its SHA-256 ``digest``, its caller, and when it ``expires`` (None: never)."""

    digest: bytes
    caller: Caller
    expires: datetime | None = None


def read_tokens(path: str) -> tuple[Token, ...]:
    """Return every token of the file; raises ``StartupError``, which never quotes the file."""
    where = f"--tokens {path}"
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise StartupError(f"{where}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{where}: is not TOML{_place_of(error)}") from None
    entries = tables.pop("token", [])
    if tables or not isinstance(entries, list) or not entries:
        raise StartupError(f"{where}: must hold one or more tables [[token]], and nothing else")
    tokens = [_token(entry, f"{where}: token {i}") for i, entry in enumerate(entries, 1)]
    callers: dict[str, Caller] = {}
    for token in tokens:
        if callers.setdefault(token.caller.name, token.caller) != token.caller:
            raise StartupError(
                f"{where}: the tokens of {token.caller.name!r} have different limits, but limits "
                "belong to the name: give each token the same limits, or another name"
            )
    if len({token.digest for token in tokens}) < len(tokens):
        raise StartupError(f"{where}: two tokens have the same sha256")
    return tuple(tokens)


def _place_of(error: Exception) -> str:
    """Return the place of the error. The rest of the parser's message may quote the file."""
    place = re.search(r" \(at (line \d+, column \d+|end of document)\)$", str(error))
    return place[0] if place else ""


def _token(entry: Any, where: str) -> Token:
    if not isinstance(entry, dict):
        raise StartupError(f"{where}: write [[token]] above its keys")
    fields = _Fields(entry, where)
    for number, key in enumerate(entry, 1):
        if key not in KEYS:
            # Not the key itself: it may be a token, pasted by mistake.
            raise StartupError(f"{where}: key {number} is not one of {', '.join(KEYS)}")
    name, digest = fields.text("name", NAME), fields.text("sha256", SHA256)
    caller = Caller(
        name=name,
        priority=fields.number("priority", low=-MAX_PRIORITY, high=MAX_PRIORITY) or 0,
        max_jobs=fields.number("max_jobs", low=1),
        jobs_per_minute=fields.rate("jobs_per_minute"),
        admin=fields.switch("admin"),
    )
    return Token(bytes.fromhex(digest), caller, fields.moment("expires"))


@dataclass(frozen=True, slots=True)
class _Fields:
    """Reads fields one by one; raises ``StartupError`` for the first invalid one."""

    entry: dict[str, Any]
    where: str

    def wrong(self, key: str, must: str) -> StartupError:
        """Return an error that says what ``key`` must be, without its value."""
        return StartupError(f"{self.where}: {key} must be {must}")

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        """Return a required string."""
        value = self.entry.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            must = {
                "name": "1 to 64 of A-Z a-z 0-9 . _ -",
                "sha256": "the SHA-256 of the token, 64 hexadecimal digits, as `darkroom-server "
                "token NAME` prints it",
            }
            raise self.wrong(key, must[key])
        return value

    def number(self, key: str, *, low: int, high: int = 10**6) -> int | None:
        """Return an integer, None if absent."""
        value = self.entry.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"a whole number, {low} to {high}")
        return value

    def rate(self, key: str) -> float | None:
        """Return a number above 0, None if absent."""
        value = self.entry.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 10**6:
            raise self.wrong(key, f"a number above 0, at most {10**6}")
        return float(value)

    def switch(self, key: str) -> bool:
        """Return a boolean, false if absent."""
        value = self.entry.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def moment(self, key: str) -> datetime | None:
        """Return a date and time with time zone, None if absent."""
        value = self.entry.get(key)
        if value is not None and not (isinstance(value, datetime) and value.tzinfo):
            raise self.wrong(key, "a date and time with its zone, such as 2030-01-31T12:00:00Z")
        return value
