"""What is promised about kills, damage and hostile input, counted."""
