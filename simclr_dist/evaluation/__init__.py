"""How good a frozen encoder is: features, weighted kNN, linear probe. Nothing here changes the encoder."""
