"""The orders in which prefills run: a file here that registers a policy adds it to all that lists policies."""
