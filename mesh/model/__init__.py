"""Frozen values every room shares: addresses, ports, services, tasks, nodes, the cluster.

Pure: no clock, no I/O.  A value that exists is valid; building an invalid one raises ValueError.
"""
