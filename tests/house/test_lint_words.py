"""The words that the prose avoids are found wherever prose stands, and nowhere else."""

import pytest

from tools.lint_words import WORDS, check, load_words


def found(file: str, source: str) -> list[tuple[int, str]]:
    return [(each.line, each.found) for each in check(file, source, load_words(WORDS))]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("README.md", "It starts.\n\nIt is started anew."),
        ("page.py", '"""Page.\n\nIt is started anew.\n"""'),
        ("page.py", "x = 1\ny = 2\nz = 3  # started anew"),
        ("page.py", "\n\nlog.info('started anew')"),
        ("page.py", "\n\nx = f'{y} anew'"),
        ("test_page.py", "\n\ndef test_it_starts_anew() -> None: ..."),
        ("page.py", "\n\nclass StartedAnew: ..."),
        ("page.proto", "message A {\n  // A name.\n  string name = 1;  // Given anew."),
        ("Makefile", "a:\n\nb: ## start anew"),
    ],
)
def test_a_word_is_found_in(file: str, source: str) -> None:
    assert [(line, word.lower()) for line, word in found(file, source)] == [(3, "anew")]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("page.proto", "message A {\n  string anew = 1;\n}"),
        ("page.py", "import anew\nanew.start()"),
        ("README.md", "It is renewed."),
    ],
)
def test_a_word_is_not_found_in(file: str, source: str) -> None:
    assert found(file, source) == []


def test_statements_of_sql_are_not_prose() -> None:
    assert found("page.py", "q = 'DELETE FROM jobs WHERE NOT kept'") == []
    assert found("page.py", "q = 'it is deleted where not kept'") == [(1, "where not")]


def test_a_phrase_is_found_across_a_line_break() -> None:
    assert found("page.py", "# Not that\n# so\n# many.") == [(2, "so many")]
    assert found("page.py", "# so\n\n# many") == []


@pytest.mark.parametrize(
    "text",
    [
        "it told the caller",
        "None where nobody asked",
        "``x`` where that fails",
        "0, where it is",
        "Who leaves the block cancels",
        "he who leaves cancels",
        "that is no number",
        "jobs are let in",
        "the job was given up",
        "let it go",
        "draw a picture",
    ],
)
def test_this_is_found(text: str) -> None:
    assert found("page.md", text)


@pytest.mark.parametrize(
    "text",
    [
        "darkroom_engines_given_up > 0",
        "there is no server",
        "it is no longer there",
        "clients who wait",
        "it knows where it is",
        "the folder where models are",
        "withdrawn",
        "inpaint",
    ],
)
def test_this_is_not_found(text: str) -> None:
    assert found("page.md", text) == []


def test_shapes_are_drawn_in_training_only() -> None:
    assert found("training/shapes.py", "# Draw a star.") == []
    assert found("server/shapes.py", "# Draw a star.")
