"""Processes that work together: torch.distributed, and failing as one."""
