"""Files of weights: layouts, detection, reading and writing."""
