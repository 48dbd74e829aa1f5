"""Operators that merge matrices by their singular vectors (TSV-M, Iso-C, Iso-CTS, KnOTS)."""
