"""What tests share: models, samples, tolerances, processes, and the programs of `make fuzz`."""
