"""Integers only: patterns, the pieces of a window, and the plan of an exchange."""
