"""Network policies: which tasks they select, and who may connect to these.  Pure."""
