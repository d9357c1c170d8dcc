"""Complete procedures that rest on the library: each answers a question about a model or trains one in its own way."""
