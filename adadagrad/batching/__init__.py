"""How a batch size becomes data: order, chunks, exact batches."""
