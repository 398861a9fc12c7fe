"""Profiles: what to measure, the file that holds it, and the report on the model that is fitted to it."""

from sgl_flowprefill.profiling.design import make_design
from sgl_flowprefill.profiling.file import Profile, ProfileError, Row, Setting, read_profile, write_profile

__all__ = ["Profile", "ProfileError", "Row", "Setting", "make_design", "read_profile", "write_profile"]
