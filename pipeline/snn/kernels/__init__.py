"""T steps of a spiking layer as one op: `reference.py` defines it, `dispatch.py` chooses a faster form of it."""
