"""The rule engine at work: forwardings that somebody wants, kept in one kernel."""
