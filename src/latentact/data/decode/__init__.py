"""From files to RGB frames with times."""
