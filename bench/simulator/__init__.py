"""Discrete-event simulator of prefill serving: the runtime's own policy objects, on a model of the machine's times."""
