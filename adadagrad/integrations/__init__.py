"""Adapters to other people's frameworks; each is imported by its path, and needs the extra of its name."""
