"""Memory that was freed is used again, and its pages are not faulted in again."""

from __future__ import annotations

import platform

import pytest
from conftest import RunPython

SIZE = 256 * 2**20

FAULTS = f"""
import resource, sys
from sharebasis.runtime.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
for _ in range(3):
    block = bytearray(b"x") * {SIZE}
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_large_block_is_cut_from_what_was_freed(run_python: RunPython) -> None:
    given_back, kept = (run_python(FAULTS, how) for how in ("given back", "kept"))
    assert not given_back.returncode, given_back.stderr
    assert not kept.returncode, kept.stderr
    assert int(given_back.stdout) >= SIZE // 2**21  # pages are of 2 MiB at most
    assert int(kept.stdout) < int(given_back.stdout) / 10


def test_another_c_library_is_left_alone(run_python: RunPython) -> None:
    ran = run_python(
        """
        import ctypes, platform
        from sharebasis.runtime.malloc import keep_freed_memory
        platform.libc_ver = lambda: ("", "")
        ctypes.CDLL = None
        assert not keep_freed_memory()
        """
    )
    assert not ran.returncode, ran.stderr
