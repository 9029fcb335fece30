"""From cropped images to SimCLR views, on the device."""
