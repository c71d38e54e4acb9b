"""A server of one trained model: completions over HTTP, many texts decoded together."""
