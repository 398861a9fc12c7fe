"""The hub: one loop that takes what has happened, picks what runs now, and runs it, without torch and SGLang."""
