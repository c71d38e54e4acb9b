"""Formats of text files: what their documents are."""
