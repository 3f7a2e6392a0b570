"""One command that proves and measures the project on a GPU; see `benchmarks.gpu.__main__`."""
