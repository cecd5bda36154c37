"""Host mode: ports that answer on the node that runs the container."""
