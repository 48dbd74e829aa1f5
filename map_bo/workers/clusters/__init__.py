"""What workers of all clusters share: the crew that directs them, and what runs in each."""
