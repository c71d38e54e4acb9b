"""The plug-in for lm-evaluation-harness: it scores texts of any length through a stream."""
