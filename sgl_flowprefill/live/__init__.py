"""What a server does now, for people who watch it: the page, the terminal, and what both are told."""

from typing import Final

PAGE: Final = "/flowprefill"
"""The page, a static file without any data."""
STATE: Final = f"{PAGE}/state"
"""What the servers do now, again and again (server-sent events)."""
TIMELINE: Final = f"{PAGE}/timeline"
"""The last seconds, for Perfetto."""
EVENTS: Final = f"{PAGE}/events"
"""The last seconds, as lines of an event log."""

__all__ = ["EVENTS", "PAGE", "STATE", "TIMELINE"]
