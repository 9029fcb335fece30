"""Pairs: images with their texts, and texts with texts. A folder each, written once by `prepare`."""
