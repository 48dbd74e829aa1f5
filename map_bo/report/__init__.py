"""What a person sees: summaries, plots and pages."""
