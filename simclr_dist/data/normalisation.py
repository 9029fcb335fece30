"""What RGB images of 8 bits are normalised with, here and in every file that leaves: (x - MEAN) / STD for x in [0, 1].

Others are normalised with their own: see PixelFormat.
"""

from simclr_dist.pixel_format import RGB

MEAN, STD = RGB.mean, RGB.std
