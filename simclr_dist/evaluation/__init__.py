"""What a frozen encoder is worth: features, weighted kNN, linear probe. Nothing here changes the encoder."""
