"""Where Triton kernels run: on the GPU, or through Triton's interpreter where there is none.

The choice must be made before anything imports Triton, as many libraries do in passing.

And what a script begins in the background, or nohup, ignores Ctrl-C or a hangup, and so would all
that it begins: commands to which a test sends one would then be waited for in vain, for minutes.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # what is begun hears it, unlike this process
