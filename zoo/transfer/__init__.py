"""Moving variants between zoos: only what the other side lacks, checked on arrival."""
