"""Which learning rate goes with the progress of a run; all in samples."""
