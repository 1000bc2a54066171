"""Load on an OpenAI-compatible server, measured from the client's side; knows nothing of engines and of Ray."""
