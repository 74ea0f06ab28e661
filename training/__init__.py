"""Learning which channels matter: `python -m training.fit` and its siblings."""
