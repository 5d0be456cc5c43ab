"""The residual stream: what is written to it, and which component an error came from."""
