"""Checkpoints in and out: `python -m convert` in a checkout, `agevlm-convert` when installed."""
