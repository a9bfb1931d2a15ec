"""The order in which the processes of `make test` get the tests."""

from pathlib import Path

import pytest

from tests.conftest import LONG, SHORT, place, pytest_collection_modifyitems

FOUND = [
    "tests/client/test_jobs.py::test_b",
    "tests/client/test_jobs.py::test_a",
    "tests/engine/test_slices.py::test_a",
    "tests/faults/test_lifetime.py::test_b[wire/1]",
    "tests/faults/test_lifetime.py::test_a",
    "tests/server/rpc/test_jobs.py::test_a",
    "tests/wire/test_sdk.py::test_a",
]


class _Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


class _Config:
    pass


class _Worker:
    workerinput: dict[str, object]

    def __init__(self) -> None:
        self.workerinput = {}


def ordered(config: object) -> list[str]:
    items = [_Item(each) for each in FOUND]
    pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    return [item.nodeid for item in items]


def test_long_tests_come_first_and_short_ones_last() -> None:
    assert ordered(_Worker()) == [*FOUND[3:5], FOUND[6], FOUND[2], *FOUND[:2], FOUND[5]]


def test_one_process_keeps_the_order() -> None:
    assert ordered(_Config()) == FOUND


@pytest.mark.parametrize("folder", [*LONG, *SHORT])
def test_every_folder_is_there(folder: str) -> None:
    assert (Path(__file__).parents[1] / folder).is_dir()


def test_a_test_of_another_project_is_in_the_middle() -> None:
    assert place("test_sample.py::test_a") == 1
