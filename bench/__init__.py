"""Measurements of the real system on this machine: `python -m bench --help`."""
