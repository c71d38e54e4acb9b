"""Raw files to a token file (prepare once), and a token file to the rows that one rank reads (every step)."""
