"""The smallest honest experiments on the methods beside training: one model, a few minutes, baselines at equal cost."""
