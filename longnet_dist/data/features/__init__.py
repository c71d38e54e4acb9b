"""Folders of features, on which encoders are trained: files, their labels, and batches of them."""
