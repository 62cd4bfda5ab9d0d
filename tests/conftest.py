"""One thread for all tests: the networks are tiny, and two threads that wait for each other cost ten times the work."""

import torch

torch.set_num_threads(1)
