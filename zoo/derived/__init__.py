"""Models made of other models: surrogates, stitches, and what blocks cost."""
