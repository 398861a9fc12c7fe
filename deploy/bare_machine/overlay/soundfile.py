"""Stands in for soundfile, which SGLang imports for models that hear."""
