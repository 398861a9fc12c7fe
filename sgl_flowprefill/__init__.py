"""sgl-flowprefill: operator-level preemption and slack-aware prefill scheduling for SGLang."""

__version__ = "0.1.0"
