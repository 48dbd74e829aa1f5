"""Models of images: classifiers, encoders with frozen heads, and models of images and text."""
