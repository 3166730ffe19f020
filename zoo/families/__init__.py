"""Model families, one declarative file each; `family` says what one is, `registry` finds it."""
