"""Parts for sequences that are long: slices over ranks, the loss in chunks, feed-forward networks in tiles."""
