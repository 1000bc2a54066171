"""What each kind of process shows on its Prometheus page, made from plain counters. Never on the path of a token."""
