"""Studies that grow: what an older one has measured, as the first evaluations of a new run."""
