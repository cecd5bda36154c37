"""Whether tasks pass the checks of their services: probed, judged and believed."""
