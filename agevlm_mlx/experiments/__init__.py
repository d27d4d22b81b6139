"""What `agevlm experiment` runs: arms x variations x lengths x seeds, and what they come to."""
