"""A trained encoder as torchvision, safetensors or ONNX file.

export.py    writes the file, compares it with the encoder, writes the card
formats.py   each format: written, and read back
card.py      the model card
"""

from simclr_dist.export.formats import load_encoder

__all__ = ["load_encoder"]
