"""From stored bytes to two crops: presets, crop parameters, the compiled kernel, ffcv's codec."""
