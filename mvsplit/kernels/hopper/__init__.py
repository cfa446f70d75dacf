"""Products for Hopper GPUs in CUDA C++, compiled at run time by the NVRTC that torch brings."""
