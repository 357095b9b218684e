"""Policies at work: one protocol over our own and LeRobot's."""
