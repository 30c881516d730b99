"""How long tests wait for other processes."""

# Seconds. It ends what hangs, and nothing else: beside busy processes everything here takes many times as long.
PATIENCE = 600
