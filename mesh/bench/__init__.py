"""What the mesh costs, measured: JSON figures, never asserts."""
