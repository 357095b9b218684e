"""File input and output: atomic writes, safe reads, the Hugging Face hub, video encoding."""
