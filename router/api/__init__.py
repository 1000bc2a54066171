"""The public face: request schemas, OpenAI-compatible HTTP and its errors."""
