"""Where samples come from: one file for each layout that image collections come in."""
