"""Modules that run with quantized weights."""
