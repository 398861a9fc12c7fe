"""What is sent: traces, synthetic workloads, prompts and answer lengths."""
