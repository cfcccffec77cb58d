"""One thread a test: two threads that wait for each other are slower than one wherever anything else runs."""

import torch

torch.set_num_threads(1)
