"""Several processes: torch.distributed, errors on all ranks, threads per process."""
