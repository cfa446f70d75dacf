"""The fused CUDA ops, one file each: Triton kernels, registered torch op, public function.

Only this folder imports Triton, and nothing imports this folder before a CUDA tensor arrives.
"""
