"""What goes wrong with images, said for the person who has to mend it."""


class DataError(Exception):
    """Images cannot be found, read or written. Names file, sample and a way out."""
