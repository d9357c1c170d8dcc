"""Optimizers: plain `torch.optim.Optimizer`, one file an algorithm, no knowledge of batches."""

from adadagrad.optimizers.adagrad_norm import AdaGradNorm

__all__ = ["AdaGradNorm"]
