"""Changes to SGLang at run time: each file names its target, the reason, and the shape that it checks."""

if __name__ == "patches":  # imported from the repository's root, past sgl_flowprefill
    from sgl_flowprefill.top_level import stand_aside

    stand_aside(__name__, __file__)
