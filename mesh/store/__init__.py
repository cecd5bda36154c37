"""The shared store: keys, codecs, an etcd client and an in-memory twin with the same semantics."""
