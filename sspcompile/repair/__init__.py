"""Repairs: what is left makes up for the heads that were removed."""
