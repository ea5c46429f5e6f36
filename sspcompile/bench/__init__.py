"""Latency and memory of finished models: fresh processes, raw samples, ratios with intervals."""
