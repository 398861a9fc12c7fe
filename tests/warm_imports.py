"""What the processes of ``tests.warm`` find imported. Only the process that they are forked from imports this."""

import gc
import signal

signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # a rank that fails sends it to its parent
gc.disable()

import hypothesis  # noqa: E402, F401 - what modules of tests import, from which functions are called
import pytest  # noqa: E402, F401
import sglang.srt.managers.scheduler  # noqa: E402
import sglang.srt.models.registry  # noqa: E402, F401
import transformers  # noqa: E402, F401

import tests.reference  # noqa: E402, F401

gc.enable()
gc.freeze()  # nothing of this is garbage, in any of them
