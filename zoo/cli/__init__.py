"""The verbs of `python -m zoo`, each in the file of its like; importing one registers it."""
