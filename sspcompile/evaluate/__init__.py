"""Answers and divergence of a finished model against the one that it was cut from."""
