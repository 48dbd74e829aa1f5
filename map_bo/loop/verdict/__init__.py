"""Whether the chosen merge is better than what a user has anyway, and how sure that is."""
