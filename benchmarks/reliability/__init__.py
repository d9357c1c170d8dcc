"""The reliability battery: what must never go wrong, measured, one figure a line.

Each file beside this one answers for some of the numbered tests: it has a function
``figures(reduced: bool) -> Iterator[Figure]``, entered in the table of `__main__`. ``reduced`` is what the test suite
runs; the whole battery takes much longer.
"""
