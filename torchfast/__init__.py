"""Six composable primitives for PyTorch training loops: fast on a GPU, and they do not die of memory."""
