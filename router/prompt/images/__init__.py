"""Pictures that clients send to tiles of pixels and token ids: headers, decoding, canvases, expansion. No model."""
