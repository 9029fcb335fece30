"""From stored bytes to resized crops: where to crop, the compiled kernel, ffcv's codec, memory for the results."""
