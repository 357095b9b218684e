"""Videos and datasets: reading from disk, decoding once into a cache, windows of frames."""
