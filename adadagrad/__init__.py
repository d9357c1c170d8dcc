"""adadagrad: training with batch sizes that the gradient itself chooses."""
