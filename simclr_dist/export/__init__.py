"""A trained encoder as torchvision, safetensors or ONNX file."""
