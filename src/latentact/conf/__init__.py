"""Named experiments: `<stage>/experiment/<name>.yaml`, differences from the dataclass defaults only."""
