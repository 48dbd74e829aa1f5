"""What the surrogate of a run still says of its front: uncertainty, and gains to be expected."""
