"""Optimizers: plain `torch.optim.Optimizer`, one file an algorithm, no knowledge of batches."""
