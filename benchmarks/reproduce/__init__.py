"""The papers' experiments: one command each; each writes JSON under results/ and prints a table for docs/results.md."""
