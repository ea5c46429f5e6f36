"""Latency, memory and quality: numbers with their samples and intervals, and no opinion about them."""
