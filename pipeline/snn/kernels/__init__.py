"""One op, T steps of a spiking layer, in several forms that agree: `dispatch.py` chooses, `reference.py` defines."""
