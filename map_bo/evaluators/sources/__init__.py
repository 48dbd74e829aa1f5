"""Where examples come from: files, folders and data sets of the Hugging Face hub."""
