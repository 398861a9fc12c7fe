"""What a test of a unified server lets happen in its engine's process: each function is called there."""
