"""What a run is, as small frozen values; imports nothing of the package."""
