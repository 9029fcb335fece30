"""A trained encoder for others: torchvision, safetensors, ONNX, timm, transformers.

export.py         writes it, compares it with the encoder, writes the card, uploads it
formats.py        the formats that are one file: written, and read back
folders.py        the formats that are a folder: timm's and transformers'
preprocessing.py  what a picture goes through before the encoder
self_check.py     the comparison
card.py           the model card
hub.py            the upload
"""

from simclr_dist.export.formats import load_encoder

__all__ = ["load_encoder"]
