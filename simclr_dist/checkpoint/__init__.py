"""Checkpoints: written whole or not at all, verified, free of pickles."""
