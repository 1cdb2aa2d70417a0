"""Many machines that answer as one: the router's policy, and serving on Ray."""
