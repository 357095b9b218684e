"""Videos and datasets: reading them from disk, decoding once into a cache, windows of frames."""
