"""What the engine costs under somebody else's trainer, beside that trainer's own loop."""
