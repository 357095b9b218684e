"""Robots: setup from a file, the connection, the safety layer, and the fixed-rate control loop."""
