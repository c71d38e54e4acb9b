"""Text becomes tokens: in this process, or in worker processes."""
