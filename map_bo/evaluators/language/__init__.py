"""What evaluators of language models are made of: tokenizers, decoding, grading."""
