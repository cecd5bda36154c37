"""Whether this host can carry the mesh, and does: checks with what to do.  Changes nothing."""
