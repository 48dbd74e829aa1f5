"""Whether models fit each other: layout, names, the same base, vocabularies."""
