"""Optimizers whose step makes the estimate and the update in one pass."""
