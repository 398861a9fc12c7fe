"""``python -m sgl_flowprefill.bench.systems``: the text of ``docs/systems.md``."""

from sgl_flowprefill.bench.systems.catalog import systems_page

print(systems_page(), end="")
