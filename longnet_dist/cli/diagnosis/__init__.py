"""What ``longnet doctor`` finds out, and what it says about it.

``probes`` runs in processes of their own, so that what crashes there, as a broken package may, is a finding and no
crash. ``facts`` collects the answers, ``findings`` judges them, ``text`` prints them.
"""
