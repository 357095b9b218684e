"""Agents: every policy, ours or LeRobot's, behind one protocol."""
