"""Which weight baseline, form of the negative term and learning rate hold: a grid of short runs, and what it shows."""
