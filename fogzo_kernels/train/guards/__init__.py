"""Guards: what a step checks so that no run goes wrong in silence."""
