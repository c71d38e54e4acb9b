"""Training of encoders on features."""
