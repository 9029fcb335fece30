"""The .beton file: reading its tables, writing it."""
