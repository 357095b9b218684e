"""Named experiments: `<stage>/experiment/<name>.yaml`, deltas from the defaults of the dataclasses only."""
