"""The smallest honest experiments on the companion optimizers: tuned on validation parts, reported on test parts."""
