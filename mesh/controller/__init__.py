"""The elected allocator: node numbers, VIPs and ingress ports, by compare-and-swap."""
