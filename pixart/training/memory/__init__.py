"""What makes a training fit a small GPU: steps of one weight at a time, with states on the CPU."""
