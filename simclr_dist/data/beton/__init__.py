"""The .beton file: preparing it from any source, writing it, reading its tables."""
