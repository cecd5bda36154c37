"""The WireGuard overlay: which peers a node has and how the device is told."""
