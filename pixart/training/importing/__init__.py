"""Configurations of other trainers as one of this pack: what corresponds is taken, the rest is named."""
