"""Entry point of the SGLang general plugin."""


def load() -> None:
    """Called by SGLang in every process that it starts."""
