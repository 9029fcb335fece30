"""Sources of images: folders, archives, the files of known datasets."""
