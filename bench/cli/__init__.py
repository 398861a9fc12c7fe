"""The commands of the benchmark."""
