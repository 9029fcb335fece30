"""What images are normalised with, here and in every file that leaves: (x - MEAN) / STD for x between 0 and 1."""

# torchvision's ImageNet statistics, used for every dataset: the encoder's first BatchNorm absorbs the difference.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
