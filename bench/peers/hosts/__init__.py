"""Scripts that run in the environments of peers and import nothing of ours."""
