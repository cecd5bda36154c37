"""Drivers: each brings one kernel facility in line with desired elements.  No policy here."""
