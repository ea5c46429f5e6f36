"""GGUF: one file with weights, tokenizer and settings, which llama.cpp and what is built on it read."""
