"""Robots: setup from a file, connection, safety layer and fixed-rate control loop."""
