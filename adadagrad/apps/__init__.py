"""Where the statistics of gradients and losses choose something else than a batch size."""
