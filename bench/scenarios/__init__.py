"""What is measured, one file each; a scenario's docstring says how and what its figures mean."""
