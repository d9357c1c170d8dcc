"""What the noise of the gradient is, measured inside the backward that runs anyway."""
