"""LoadGen on one machine, the system under test on others; see docs/mlperf-network.md for the bytes between them."""
