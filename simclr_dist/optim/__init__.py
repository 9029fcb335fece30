"""LARS and Muon, groups of parameters, the learning rate, and gradients in micro-batches."""
