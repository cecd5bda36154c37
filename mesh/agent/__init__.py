"""The daemon of every node: composes the rooms and keeps the kernel in line with etcd."""
