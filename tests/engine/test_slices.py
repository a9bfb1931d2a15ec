"""Work in slices on the loop's thread, and the loop's pauses while a model is read."""

import queue
import threading

import pytest
import torch

from darkroom_server.engine.catalogue.global_settings import LoopPaused, exclusive_settings
from darkroom_server.engine.catalogue.slices import SlicedWork, between_batches, pause
from darkroom_server.engine.pipelines.coroutine import Coroutine, is_suspendable, suspend


def test_work_runs_from_pause_to_pause() -> None:
    done: list[str] = []

    def work() -> str:
        done.append("first")
        pause()
        read = between_batches(lambda rows: float(rows))
        done.append(str(read(2)))
        return "result"

    sliced = SlicedWork(work)
    assert not sliced.run()
    assert done == ["first"]
    assert not sliced.run()
    assert done == ["first"]
    assert sliced.run()
    assert (done, sliced.result) == (["first", "2.0"], "result")


def test_an_error_ends_the_work() -> None:
    def work() -> None:
        pause()
        raise ValueError("broken")

    sliced = SlicedWork(work)
    assert not sliced.run()
    with pytest.raises(ValueError, match="broken"):
        sliced.run()


def test_a_pause_outside_of_sliced_work_does_nothing() -> None:
    pause()
    assert between_batches(lambda: 3.0)() == 3.0


def test_a_sample_can_be_suspended_in_sliced_work_and_the_work_itself_cannot() -> None:
    seen: list[object] = []

    def work() -> None:
        seen.append(is_suspendable())
        run = Coroutine(lambda: suspend("call", "cpu"), "cpu")
        seen.append(run.start())
        pause()
        seen.append(run.resume("answer"))

    sliced = SlicedWork(work)
    assert not sliced.run()
    assert sliced.run()
    assert seen == [False, "call", "answer"]


def test_the_loop_pauses_while_the_default_dtype_is_another() -> None:
    """As diffusers and transformers do it: set, make a module, set it back; also nested."""
    asked: queue.SimpleQueue[LoopPaused] = queue.SimpleQueue()
    made: list[torch.dtype] = []
    go_on = threading.Event()

    def read() -> None:
        with exclusive_settings(asked.put):
            for dtype in (torch.bfloat16, torch.float32):
                usual = torch.get_default_dtype()
                torch.set_default_dtype(dtype)
                made.append(torch.empty(1).dtype)
                torch.set_default_dtype(usual)
            go_on.wait()
            torch.set_default_dtype(torch.bfloat16)  # And an error before it is set back.

    thread = threading.Thread(target=read)
    thread.start()
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        held = asked.get(timeout=30)
        assert len(made) == number  # It waits until the loop pauses.
        held.hold()
        assert made[-1] is dtype
        assert torch.get_default_dtype() is torch.float32
    assert asked.empty()
    go_on.set()
    asked.get(timeout=30).hold()
    thread.join()
    assert torch.get_default_dtype() is torch.float32
    torch.set_default_dtype(torch.float32)  # No pause on other threads.
    assert asked.empty()
