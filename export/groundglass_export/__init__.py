"""From checkpoint to served model: network, training, ONNX, parity, manifest."""
