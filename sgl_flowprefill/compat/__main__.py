"""``python -m sgl_flowprefill.compat``: the text of ``docs/compatibility.md``."""

from sgl_flowprefill.compat.page import compatibility_page

print(compatibility_page(), end="")
