"""The laboratory: what is said of batch normalization, measured on real data."""
