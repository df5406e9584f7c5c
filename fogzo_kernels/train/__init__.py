"""Fogzo: the estimator around any training loop."""
