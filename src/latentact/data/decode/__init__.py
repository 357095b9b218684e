"""Decode video files to RGB frames with timestamps."""
