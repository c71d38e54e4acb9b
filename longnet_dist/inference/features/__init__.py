"""What is done with models of features: runs, their exports, and folders of features that they read."""
