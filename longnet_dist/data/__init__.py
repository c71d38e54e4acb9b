"""This package writes raw text into a token file, once, and reads from it the tokens of one rank, in every step."""
