"""From a trained checkpoint to an ONNX file that agrees with it."""
