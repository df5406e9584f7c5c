"""Benchmarks and demos; run as ``python -m bench.<name>``."""
