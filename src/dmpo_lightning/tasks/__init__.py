"""Benchmarks as plain Python: examples, prompts, scores. A new one is its file here and a line in `_HOMES`."""
