"""A local chat that shows where every word looked: `python -m app`, installed `agevlm-app`."""
