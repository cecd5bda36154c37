"""The table of verbs.  Heavy libraries are imported inside the verb that needs them."""


def main() -> None:
    """Run the command line."""
