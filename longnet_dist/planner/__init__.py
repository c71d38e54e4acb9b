"""What a run will need and how long it takes, by arithmetic on its configuration: nothing is allocated."""
