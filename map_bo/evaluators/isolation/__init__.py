"""What surrounds an evaluation: what it changes outside the model is undone afterwards."""
