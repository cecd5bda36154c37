"""Whether the other nodes can be reached over the overlay, as this node finds out itself."""
