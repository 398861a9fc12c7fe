"""Sending a trace to an endpoint."""
