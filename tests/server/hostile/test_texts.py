"""Malformed texts from callers and operators: parsed, or rejected with a message."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darkroom_server.core.errors import StartupError, Unauthenticated
from darkroom_server.security.token_file import KEYS, read_tokens
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.trace_context import parse_traceparent

LINES = st.one_of(
    st.just("[[token]]"),
    st.builds(
        "{} = {}".format,
        st.sampled_from((*KEYS, "other")),
        st.one_of(
            st.integers().map(str),
            st.floats().map(str),
            st.sampled_from(("true", "'a'", "[]", "{}", f"'{'0' * 64}'", "2030-01-31T12:00:00Z")),
            st.text(),
        ),
    ),
    st.text(),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(LINES).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_token_file_is_parsed_or_rejected(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    try:
        tokens = read_tokens(str(file))
    except StartupError:
        return
    assert tokens


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text())
def test_random_text_is_never_a_valid_token(file: Path, text: str) -> None:
    file.write_text(f"[[token]]\nname = 'a'\nsha256 = '{'0' * 64}'\n")
    with pytest.raises(Unauthenticated):
        Tokens(str(file)).caller(text)


@given(st.one_of(st.text(), st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")))
def test_any_traceparent_is_parsed_or_ignored(text: str) -> None:
    found = parse_traceparent(text)
    assert found is None or re.fullmatch("[0-9a-f]{32}", found.trace_id)
