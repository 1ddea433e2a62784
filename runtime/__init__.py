"""From an artifact to streamed tokens. Imports neither torch nor onnx."""
