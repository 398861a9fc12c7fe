"""The wall clock of a process whose PYTHONPATH has this folder: ``time.time`` plus what a file says, at every call.

Python runs this before anything else, so whoever takes ``time.time`` takes this one. CLOCK_MONOTONIC, which
``time.monotonic`` and ``time.perf_counter`` show, goes on as it does when somebody sets the clock. The file of
WALL_CLOCK_FILE holds one double, the offset in seconds; processes that were spawned read the same one.

GARBAGE_THRESHOLD is after how many new objects such a process looks for garbage (``gc.set_threshold``).
"""

import gc
import mmap
import os
import struct
import time

if "GARBAGE_THRESHOLD" in os.environ:
    gc.set_threshold(int(os.environ["GARBAGE_THRESHOLD"]))

if "WALL_CLOCK_FILE" in os.environ:

    def _stepping() -> object:
        with open(os.environ["WALL_CLOCK_FILE"], "rb") as file:
            offset = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        wall, unpack = time.time, struct.Struct("d").unpack_from
        return lambda: wall() + unpack(offset)[0]

    time.time = _stepping()  # type: ignore[assignment]
