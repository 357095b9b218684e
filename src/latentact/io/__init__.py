"""Files: written atomically, read safely, moved to and from the Hugging Face hub, encoded as video."""
