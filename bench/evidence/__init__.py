"""What the method is worth: programs that train; run as ``python -m bench.evidence.<name>``."""
