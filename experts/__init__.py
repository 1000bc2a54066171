"""What an expert is, where it lives and the host that computes it; knows neither router nor cluster."""
