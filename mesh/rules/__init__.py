"""The rule engine, pure: what a forwarding is, and what it becomes in each dialect.

Knows frontends, pools and policies; knows nothing of etcd, nodes or clocks.
"""
