"""Optimizers whose step makes the estimate, the update and the next Q(theta) in one pass."""
