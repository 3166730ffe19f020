"""Variants that have shapes and no weights, for benchmarks of models too large to fetch."""
