"""`simclr-dist plan`: what a training will need and how long it will take, before it is started."""
