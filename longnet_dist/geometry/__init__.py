"""This package computes patterns, the pieces of a window and the plan of an exchange, with integers only."""
