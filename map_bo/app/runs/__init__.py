"""Commands on a run that has begun: other settings, asking and telling."""
