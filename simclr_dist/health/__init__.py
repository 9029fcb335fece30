"""Is the representation healthy? Figures, and the check that the trainer makes."""
