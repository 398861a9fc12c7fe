"""Stands in for IPython, of which SGLang imports ``display`` for notebooks."""
