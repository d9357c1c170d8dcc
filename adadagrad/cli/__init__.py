"""The command line: ``adadagrad train``, ``compare`` and ``report``."""
