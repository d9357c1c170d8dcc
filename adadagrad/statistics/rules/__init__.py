"""Exact per-example rules, one file a family of layers."""
