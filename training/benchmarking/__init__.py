"""Parts of `python -m training.benchmark`: a fair clock, the variants, the machine, tables."""
