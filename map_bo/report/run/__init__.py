"""One run for people: card, page, plots and tables."""
