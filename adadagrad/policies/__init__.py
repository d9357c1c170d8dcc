"""Which batch size: pure arithmetic on a record, no torch."""
