"""Links that carry shipments from a router to hosts; one contract, several implementations."""
