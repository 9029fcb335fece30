"""What a run shows: TensorBoard, log.jsonl, the terminal, other loggers."""
