"""The systems that can be compared, and their servers."""
