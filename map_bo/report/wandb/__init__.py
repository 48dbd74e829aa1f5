"""A comparison as a W&B Report."""
