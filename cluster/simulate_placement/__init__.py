"""What the planner would do with a load: the very same control loop, without a cluster."""
