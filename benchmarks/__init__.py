"""Measured comparisons: one script a question; each prints a table and writes JSON under results/."""
