"""The command ``longnet``: each module of this folder and of ``features/`` is one subcommand, named as it is called.

A subcommand has ``SUMMARY``, its line in ``longnet --help``, and ``main(arguments)``, which runs it. Its module imports
nothing heavy at the top, so that the help comes at once. ``program/`` has what they share.
"""
