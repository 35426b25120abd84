"""How a training goes: the loss on pictures that it does not see, by timestep, and the best state so far."""
