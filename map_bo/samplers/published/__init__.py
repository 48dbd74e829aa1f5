"""MAP's adaptive sampling: as published, and repaired."""
