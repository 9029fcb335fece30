"""LARS, the learning rate, and gradients in micro-batches."""
