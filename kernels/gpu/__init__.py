"""The Triton kernels and their launchers, one file a fused op; importing it needs triton."""
