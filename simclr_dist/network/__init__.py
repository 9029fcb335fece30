"""The network: encoder, projection head, global BatchNorm."""
