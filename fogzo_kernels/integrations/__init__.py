"""What other libraries call; each module here imports one of them, and nothing else of the package does."""
