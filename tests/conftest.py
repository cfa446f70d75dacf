"""Where Triton kernels run: on the GPU, or through Triton's interpreter where there is none.

The choice must be made before anything imports Triton, as many libraries do in passing.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
