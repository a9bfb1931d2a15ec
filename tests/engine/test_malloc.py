"""What the engine's process does with freed memory, seen by Linux's count of page faults."""

import subprocess
import sys

CHURN = """
import ctypes, resource, sys
if sys.argv[1] == "keep":
    from darkroom_server.engine.device.malloc import keep_freed_memory
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 16 * 2**20

def touch():
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CHURN, how], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_what_is_freed_is_used_again_without_faults() -> None:
    assert faults("keep") < 100
    assert faults("leave") > 1000  # What glibc would do by itself.
