"""Ingress mode and virtual addresses: who may be chosen, and what is allocated."""
