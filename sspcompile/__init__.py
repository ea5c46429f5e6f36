"""Compile a scenario and a frozen decoder LLM into a physically smaller dense model."""

__version__ = "0.1.0"
