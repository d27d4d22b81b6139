"""What `agevlm benchmark` is made of; `benchmarks/` uses the same parts against other programs."""
