"""LeRobot policies: training as in `lerobot-train`, and adaptation to another dataset."""
