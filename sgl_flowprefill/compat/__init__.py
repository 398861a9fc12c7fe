"""SGLang's options: which FlowPrefill leaves, sets or refuses, and why."""

from sgl_flowprefill.compat.check import (
    Change,
    Finding,
    Refusal,
    WithStorage,
    checked_attention_backend,
    explain,
    incompatible_option,
    refusals,
    risks,
    server_of,
    take_over,
    take_over_decode_server,
    unchecked_attention_backend,
)
from sgl_flowprefill.compat.page import EXAMPLES, compatibility_page
from sgl_flowprefill.compat.row import MODE, SERVERS, Group, Row, Server, flag
from sgl_flowprefill.compat.table import (
    CHECKED_ATTENTION_BACKENDS,
    READ_OPTIONS,
    REFUSED_ENVIRONMENT,
    ROWS,
    TABLE,
    UNSET_ENVIRONMENT,
)

__all__ = [
    "CHECKED_ATTENTION_BACKENDS",
    "EXAMPLES",
    "MODE",
    "READ_OPTIONS",
    "REFUSED_ENVIRONMENT",
    "ROWS",
    "SERVERS",
    "TABLE",
    "UNSET_ENVIRONMENT",
    "Change",
    "Finding",
    "Group",
    "Refusal",
    "Row",
    "Server",
    "WithStorage",
    "checked_attention_backend",
    "compatibility_page",
    "explain",
    "flag",
    "incompatible_option",
    "refusals",
    "risks",
    "server_of",
    "take_over",
    "take_over_decode_server",
    "unchecked_attention_backend",
]
