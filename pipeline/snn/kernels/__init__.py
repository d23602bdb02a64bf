"""One op, T steps of a spiking layer, in several forms that agree: `select.py` chooses, `reference.py` defines."""
