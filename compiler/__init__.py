"""From a checkpoint to an optimized ONNX directory."""
