"""Where images come from: folders, archives, files of known data sets."""
