"""The executor of the native dialect on GPUs, in PyTorch and Triton: the same graphs behind the same session."""
