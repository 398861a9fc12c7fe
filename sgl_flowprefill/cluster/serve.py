"""``python -m sgl_flowprefill.cluster.serve MODULE ARGUMENTS``: what ``python -m MODULE ARGUMENTS`` does, with an API
key that nobody reads in the list of processes.

SGLang and smg take their key from the command line only. Here it comes in the environment, which other users cannot
read, and is the last of ``sys.argv`` when the module, unmodified, looks there. SGLang logs all its options when it
starts: the key is masked in what this process logs.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from typing import Any, Final

from sgl_flowprefill.cluster.base import KEY_VARIABLE
from sgl_flowprefill.cluster.phases import importing

MASKED: Final = "***"


def main() -> None:
    """Run the module that the first argument names as the main module of this process."""
    module = sys.argv[1]
    print(importing(module), flush=True)
    sys.argv = sys.argv[1:]
    key = os.environ.pop(KEY_VARIABLE, None)
    if key:
        sys.argv.append(f"--api-key={key}")
        _mask_in_logs(key)
    # As __main__ with the module's own name: processes that multiprocessing spawns import that, and not this file.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _mask_in_logs(key: str) -> None:
    make = logging.getLogRecordFactory()

    def masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # its handler says what is wrong with it
            return record
        if key in text:
            record.msg, record.args = text.replace(key, MASKED), None
        return record

    logging.setLogRecordFactory(masked)


if __name__ == "__main__":
    main()
