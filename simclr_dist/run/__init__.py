"""A run directory: its files, its owner, its state, requests to it."""
