"""`python -m mesh` is the command line; nothing else lives here."""

from mesh.cli import main

if __name__ == "__main__":
    main.main()
