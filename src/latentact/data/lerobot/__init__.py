"""LeRobot datasets: read, convert, extend and write."""
