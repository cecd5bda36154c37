"""warren-mesh: an ingress routing mesh for container clusters, driven by etcd."""

__version__ = "0.1.0"
