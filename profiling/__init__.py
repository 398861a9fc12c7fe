"""Profiles: what to measure, the file that holds it, and the report on the model that is fitted to it."""

if __name__ == "profiling":  # imported from the repository's root: Python 3.15 has a module of this name
    from sgl_flowprefill.top_level import stand_aside

    stand_aside(__name__, __file__)
else:
    from sgl_flowprefill.profiling.design import make_design
    from sgl_flowprefill.profiling.file import Profile, ProfileError, Row, Setting, read_profile, write_profile

    __all__ = ["Profile", "ProfileError", "Row", "Setting", "make_design", "read_profile", "write_profile"]
