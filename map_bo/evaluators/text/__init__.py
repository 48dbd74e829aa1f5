"""Evaluators of texts: classification, pairs and regression, with the model's or a frozen head."""
