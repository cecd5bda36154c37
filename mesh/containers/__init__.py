"""The containers' side of a node: a network namespace on the bridge, its addresses, its process."""
