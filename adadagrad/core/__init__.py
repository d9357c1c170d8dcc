"""The nouns of the library: records, settings, checks, errors. Imports nothing else of ours."""
