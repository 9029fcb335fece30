"""The trainer: what it consists of, its step, its loop."""
