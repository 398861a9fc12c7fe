"""What this project expects of SGLang, in one table, and whether an SGLang is so."""

from sgl_flowprefill.contract.check import SeamError, expect, require, verdicts
from sgl_flowprefill.contract.row import Part, Row, Verdict
from sgl_flowprefill.contract.sources import Tree
from sgl_flowprefill.contract.table import PARTS
from sgl_flowprefill.contract.versions import installed, is_supported, supported

__all__ = [
    "PARTS",
    "Part",
    "Row",
    "SeamError",
    "Tree",
    "Verdict",
    "expect",
    "installed",
    "is_supported",
    "require",
    "supported",
    "verdicts",
]
