"""Subcommands on folders of features."""
