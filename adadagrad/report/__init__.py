"""Reads run.jsonl and writes tables, plots and one self-contained page; never imports torch."""
